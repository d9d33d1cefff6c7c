import statistics
import sys
from pathlib import Path

import demo
import pytest
from small_runs import EXAMPLES

import quantize


def log(accuracies, peak):
    return [{"test_top1": value, "peak_mib": peak} for value in accuracies]


ENTRIES = {"plain": log([60.0, 98.25], 255.0), "2 bits": log([55.0, 98.5], 85.0)}


def test_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = demo.table(ENTRIES, [1.5, 0.125], [300.0, 312.0])
    lines = demo.render(rows).splitlines()[2:]
    for line, expected in zip(
        lines, ("98.2 98.5 +0.2 points", "1.500 0.125 12.0x less", "255.0 85.0 3.0x less", "300.0 312.0 1.04x"), strict=True
    ):
        assert " ".join(line.split()).endswith(expected)
    demo.plot(ENTRIES, rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(Path(quantize.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = ["--dataset", "digits", "--width", "4", "--limit-train", "64", "--limit-test", "20", "--batch-size", "16"]
    demo.main(["--epochs", "1", "--output", str(tmp_path), "--", *more])
    output = capsys.readouterr().out
    assert "saved for backward" in output and f"plot: {tmp_path / 'demo.png'}" in output
    assert {"plain", "2-bits", "summary.json", "demo.png"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "train.py: error: --epochs must be at least 1; got 0"),
        (["--", "--training-only"], "--training-only does not belong here"),
        (["--", "--resume", "a", "--evaluate"], "--evaluate does not belong here"),
    ],
)
def test_bad_flags_end_before_a_training(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--output", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


def test_a_failed_training_ends_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: demo.subprocess.CompletedProcess(a, 3))
    with pytest.raises(SystemExit, match="3"):
        demo.main(["--output", str(tmp_path)])


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    import accuracy

    return accuracy


def runs(**values):
    names = {"fp32": "fp32", "fixed": "2/2 group", "adaptive": "2/8 group layer", "once": "4/4"}
    row = {"saved_mib_per_image": 0.1}
    return [
        row | {"configuration": names[key], "seed": seed, "top1": top1} for key, many in values.items() for seed, top1 in enumerate(many)
    ]


def test_accuracy_table(accuracy):
    fp32, good, bad = [98.5, 98.4, 98.6], [98.4, 98.5, 98.3], [97.0, 97.1, 96.9]
    rows = {row["configuration"]: row for row in accuracy.table(runs(fp32=fp32, fixed=good, adaptive=bad, once=[98.0]))}
    assert rows["2/2 group"]["passes"] is True and rows["2/8 group layer"]["passes"] is False
    assert rows["4/4"]["interval"] is None and rows["4/4"]["passes"] is None
    assert rows["2/2 group"]["difference"] == pytest.approx(-0.1)
    assert rows["fp32"]["deviation"] == pytest.approx(statistics.stdev(fp32))
    text = accuracy.render(list(rows.values()))
    assert "passes" in text and "FAILS: wholly below -0.3" in text


def test_accuracy_of_runs_that_diverge(accuracy, tmp_path, monkeypatch):
    def run(flags, folder):
        folder.mkdir()
        (folder / "output.txt").write_text("epoch 1\ntrain.py: loss is nan at step 42 of epoch 1; the first layer to make it is conv1\n")
        raise accuracy.subprocess.CalledProcessError(1, "train.py")

    monkeypatch.setattr(accuracy.trainings, "run", run)
    diverged = accuracy.train("mobilevit", "2/2 group", 0, tmp_path)
    assert diverged["top1"] is None and diverged["diverged"].startswith("loss is nan at step 42")
    by_name = {row["configuration"]: row for row in accuracy.table([*runs(fp32=[98.0, 98.2]), diverged])}
    assert by_name["2/2 group"]["passes"] is False and by_name["2/2 group"]["mean"] is None
    assert "1 diverged" in accuracy.render(list(by_name.values()))
    mixed = accuracy.table([*runs(fp32=[98.0, 98.2], fixed=[98.0, 98.1]), diverged])[1]
    assert mixed["passes"] is False and mixed["seeds"] == 2 and mixed["diverged"] == 1


def test_welch_interval_is_scipys(accuracy):
    stats = pytest.importorskip("scipy.stats")
    left, right = [98.5, 98.1, 98.8, 98.2], [98.0, 98.05, 97.9]
    expected = stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
    assert accuracy.welch(left, right) == pytest.approx((expected.low, expected.high))
    assert accuracy.welch([1.0, 1.0], [2.0, 2.0]) == (-1.0, -1.0)


def test_accuracy_keeps_what_is_done(accuracy, tmp_path, monkeypatch, capsys):
    trained = []

    def train(arch, configuration, seed, workspace):
        trained.append((configuration, seed))
        return runs(fp32=[98.0])[0] | {
            "configuration": configuration,
            "seed": seed,
            "flags": accuracy.flags_of(arch, configuration),
            "seconds": 1.0,
        }

    monkeypatch.setattr(accuracy, "train", train)
    output = tmp_path / "results" / "accuracy.json"
    for seeds in ("1", "2", "2"):
        monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", seeds, "--only", "fp32", "4/4", "--output", str(output), "--jobs", "1"])
        assert accuracy.main() == 0
    assert trained == [("fp32", 0), ("4/4", 0), ("fp32", 1)]
    assert Path(output).exists() and "fp32" in capsys.readouterr().out
