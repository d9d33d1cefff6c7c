"""evaluate.py on tiny runs laid out as launch.sh lays them out."""

import shutil

import evaluate
import measure
import pytest
import torch
import train as train_script
from small_runs import SMALL

pandas = pytest.importorskip("pandas")
pytest.importorskip("safetensors")
SEEDS = (0, 1)
FLAGS = ["--arch", "resnet20", "--dataset", "digits", "--width", "4", "--limit-test", "37", "--batch-size", "64"]
FLAGS += ["--seeds", "0", "1", "--quantizers", "po2plus", "--bits", "4"]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Full precision, and fine-tuned at 4 bits PO2+, for both seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        for name, flags in (("fp32", []), ("po2plus-4", ["--weights", "po2plus", "--init-from"])):
            workspace = folder / f"digits-resnet20-{name}-seed{seed}"
            flags = [*flags, str(folder / f"digits-resnet20-fp32-seed{seed}" / "last.pt")] if flags else []
            assert train_script.main([*SMALL, "--seed", str(seed), "--workspace", str(workspace), *flags]) == 0
            shutil.rmtree(workspace / "tensorboard", ignore_errors=True)
    return folder


@pytest.fixture
def workspace(trainings, tmp_path):
    """A copy of the trainings that a test may damage."""
    return shutil.copytree(trainings, tmp_path / "runs")


@pytest.fixture
def evaluated(workspace, tmp_path, monkeypatch):
    """Function running evaluate.py: exit status, table, and the number of rows that were measured."""
    monkeypatch.setattr(measure, "RUNS", (1, 1))
    original, count = measure.Bench.measure, [0]

    def counted(*arguments):
        count[0] += 1
        return original(*arguments)

    monkeypatch.setattr(measure.Bench, "measure", counted)
    output = tmp_path / "results" / "results.csv"

    def run(*flags):
        count[0] = 0
        status = evaluate.main([*FLAGS, "--workspace", str(workspace), "--output", str(output), *flags])
        return status, pandas.read_csv(output) if output.exists() else None, count[0]

    return run


def test_rows(evaluated, workspace, capsys):
    import logs

    status, table, measured = evaluated()
    assert (status, measured, len(table)) == (0, 6, 6)
    assert list(zip(table.method, table["quantizer"], table.bits, table.seed, strict=True)) == [
        *(("fp32", "none", 32, seed) for seed in SEEDS),
        *((method, "po2plus", 4, seed) for method in ("ptq", "qat") for seed in SEEDS),
    ]
    rows = table.set_index(["method", "seed"])
    for (method, folder), seed in ((pair, seed) for pair in (("fp32", "fp32"), ("qat", "po2plus-4")) for seed in SEEDS):
        logged = logs.read(workspace / f"digits-resnet20-{folder}-seed{seed}" / "log.jsonl")[-1]
        assert rows.top1[method, seed] == pytest.approx(logged["test_top1"])
        # The packed model, loaded from its file, is the one that was trained.
        assert rows.test_loss[method, seed] == pytest.approx(logged["test_loss"], rel=1e-4)
    assert (rows.relative_mse["fp32"] == 0).all()
    assert rows.relative_mse[["ptq", "qat"]].between(0.002, 0.05).all()
    parameters = sum(value.numel() for value in torch.load(workspace / "digits-resnet20-fp32-seed0" / "last.pt")["model"].values())
    assert rows.file_bytes["fp32", 0] > 4 * parameters > rows.file_bytes["ptq", 0] == rows.file_bytes["qat", 1]
    assert (table[[name for name in table if name.endswith("_ms")]] > 0).all(axis=None)
    output = capsys.readouterr().out
    mean, deviation = rows.top1["qat"].mean(), rows.top1["qat"].std()
    assert f"{mean:.2f} ± {deviation:.2f}" in output


def test_only_what_changed_is_measured(evaluated, workspace):
    _, before, _ = evaluated("--skip-qat")
    assert evaluated("--skip-qat")[2] == 0
    _, more, measured = evaluated()
    assert measured == 2
    pandas.testing.assert_frame_equal(before, more[more.method != "qat"].reset_index(drop=True))
    file = workspace / "digits-resnet20-fp32-seed1" / "last.pt"
    content = torch.load(file, weights_only=True)
    content["model"]["fc.bias"] += 1
    torch.save(content, file)
    _, after, measured = evaluated()
    assert measured == 2
    changed = (after.fingerprint != more.fingerprint).to_numpy()
    assert changed.tolist() == [seed == 1 and method != "qat" for method, seed in zip(after.method, after.seed, strict=True)]
    assert evaluated("--limit-test", "20")[2] == 6


def test_other_rows_stay(evaluated):
    evaluated("--skip-qat", "--seeds", "0")
    status, table, measured = evaluated("--reestimate-bn", "--skip-qat", "--seeds", "1", "--batches", "2", "--bits", "3")
    assert (status, measured) == (0, 2)
    assert table.method.tolist() == ["fp32", "fp32", "ptq", "ptq+bn"] and table.bits.tolist() == [32, 32, 4, 3]


def test_rows_of_other_networks_stay(evaluated, workspace, tmp_path):
    """Of another width or other float layers, on a wrong call's checkpoint, or on one of another workspace that is unfinished."""
    ptq = ("--skip-qat", "--seeds", "0")
    _, before, _ = evaluated(*ptq)
    status, table, measured = evaluated(*ptq, "--width", "8")  # there is no checkpoint of that width
    assert (status, measured) == (1, 0)
    pandas.testing.assert_frame_equal(before, table)
    status, table, _ = evaluated(*ptq, "--float-layers", "no such layer")
    assert status == 1 and table.float_layers.tolist() == ["default"] * 2
    _, table, measured = evaluated(*ptq, "--float-layers", "conv1", "fc")
    assert measured == 1 and table.float_layers.tolist() == ["default", "conv1 fc", "default"] and set(table.width) == {4}
    other = tmp_path / "other" / "digits-resnet20-fp32-seed0" / "last.pt"
    other.parent.mkdir(parents=True)
    torch.save(torch.load(workspace / "digits-resnet20-fp32-seed0" / "last.pt") | {"epoch": 1}, other)
    status, again, _ = evaluated(*ptq, "--workspace", str(tmp_path / "other"))
    assert status == 1
    pandas.testing.assert_frame_equal(table, again)


def test_full_precision_has_no_bits_of_activations(evaluated):
    evaluated("--skip-qat", "--seeds", "0")
    _, table, measured = evaluated("--skip-qat", "--seeds", "0", "--activation-bits", "8", "--batches", "10")
    assert measured == 1 and table.activation_bits.tolist() == [32, 8, 32]


def test_calibrated_activations(evaluated):
    status, table, _ = evaluated("--skip-qat", "--seeds", "0", "--weight-activation-bits", "8", "--batches", "1", "--quantizers", "uniform")
    assert status == 0 and table.activation_bits.tolist() == [32, 8]
    assert abs(table.test_loss[1] - table.test_loss[0]) < 0.5 * table.test_loss[0]


def test_missing_damaged_and_unfinished_are_named(evaluated, workspace, capsys):
    assert evaluated()[0] == 0
    (workspace / "digits-resnet20-fp32-seed0" / "last.pt").unlink()
    damaged = workspace / "digits-resnet20-po2plus-4-seed0" / "last.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    unfinished = workspace / "digits-resnet20-po2plus-4-seed1" / "last.pt"
    content = torch.load(unfinished, weights_only=True)
    torch.save(content | {"epoch": 2}, unfinished)
    capsys.readouterr()
    status, table, measured = evaluated()
    assert (status, measured) == (1, 0)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert errors[0].endswith(f"there is none at {workspace / 'digits-resnet20-fp32-seed0' / 'last.pt'}")
    assert f"{damaged} is damaged" in errors[1] and f"{unfinished} is unfinished, at epoch 2 of 3" in errors[2]
    # What was measured on a checkpoint that is gone stays; what is no longer true goes.
    assert list(zip(table.method, table.seed, strict=True)) == [("fp32", 0), ("fp32", 1), ("ptq", 0), ("ptq", 1)]


def test_other_models_are_named(evaluated, capsys):
    assert evaluated("--width", "8", "--skip-qat")[0] == 1
    assert "is of another model: expected arch resnet20, width 8" in capsys.readouterr().err
    assert evaluated("--bits", "3", "--seeds", "0")[0] == 1
    assert "there is none at" in capsys.readouterr().err


def test_binary_networks(tmp_path, monkeypatch, capsys):
    import logs

    monkeypatch.setattr(measure, "RUNS", (1, 1))
    networks = {"fp32": [], "xnor-1-a1": ["--weights", "xnor"], "dorefa-2-a2": ["--weights", "dorefa"]}
    for seed in SEEDS:
        for name, flags in networks.items():
            folder = tmp_path / f"digits-resnet20_q-{name}-seed{seed}"
            begin = (
                ["--init-from", str(tmp_path / f"digits-resnet20_q-fp32-seed{seed}" / "last.pt"), "--reestimate-bn", "2"] if flags else []
            )
            epochs = ["--epochs", "1", "--seed", str(seed), "--workspace", str(folder)]
            assert train_script.main([*SMALL, "--arch", "resnet20_q", *flags, *begin, *epochs]) == 0
    flags = [*FLAGS, "--arch", "resnet20_q", "--quantizers", "xnor", "dorefa", "--bits", "2", "--workspace", str(tmp_path)]
    assert evaluate.main([*flags, "--output", str(tmp_path / "results.csv")]) == 0
    table = pandas.read_csv(tmp_path / "results.csv")
    columns = (table.method, table["quantizer"], table.bits, table.activation_bits, table.seed)
    asked = [("fp32", "none", 32, 32), ("qat", "dorefa", 2, 2), ("qat", "xnor", 1, 1)]
    assert list(zip(*columns, strict=True)) == [(*key, seed) for key in asked for seed in SEEDS]
    rows = table.set_index(["quantizer", "seed"])
    for quantizer, name in (("none", "fp32"), ("xnor", "xnor-1-a1"), ("dorefa", "dorefa-2-a2")):
        for seed in SEEDS:
            logged = logs.read(tmp_path / f"digits-resnet20_q-{name}-seed{seed}" / "log.jsonl")[-1]
            assert rows.test_loss[quantizer, seed] == pytest.approx(logged["test_loss"], rel=1e-3)
    assert rows.file_bytes["none", 0] > rows.file_bytes["dorefa", 0] > rows.file_bytes["xnor", 0]
    xnor = rows.top1["xnor"]
    assert f"{xnor.mean():.2f} ± {xnor.std():.2f}" in capsys.readouterr().out


def test_flags_of_training(monkeypatch, capsys):
    args = evaluate.parse([*FLAGS, "--activation-bits", "32", "--num-classes", "12"])
    run = evaluate.run_of(args, "po2plus", 4, 0, 10)
    assert (run.activation_bits, run.num_classes) == (None, 12) and run.workspace.name == "digits-resnet20-po2plus-4-seed0"
    dorefa = evaluate.run_of(evaluate.parse([*FLAGS, "--quantizers", "dorefa", "--activation-bits", "32"]), "dorefa", 4, 0, 10)
    assert dorefa.activation_bits is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        evaluate.parse([*FLAGS, "--device", "cuda"])
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "4", "9"], "--bits must be from 2 to 8; got 4 9"),
        (["--weight-activation-bits", "1"], "--activation-bits must be from 2 to 8; got 1"),
        (["--weight-activation-bits", "0"], "--activation-bits must be from 2 to 8; got 0"),
        (["--quantizers", "dorefa", "--bits", "2", "9"], "--bits must be from 1 to 8 or 16 with --quantizers dorefa; got 2 9"),
        (["--quantizers", "po2", "xnor", "--activation-bits", "2"], "--activation-bits must be 1 with --quantizers xnor; got 2"),
        (["--batches", "0"], "--batches must be at least 1; got 0"),
        (["--limit-test", "-3"], "--limit-test must be at least 1; got -3"),
        (["--limit-test", "0"], "--limit-test must be at least 1; got 0"),
        (["--quantizers", "po3"], "--quantizers"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse([*FLAGS, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("a,b\n1,2\n", "to have the columns arch, .*; got a, b"), ("", "to be a CSV of this script")]
)
def test_foreign_csv(tmp_path, text, message):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=f"--output: expected .*results.csv {message}"):
        evaluate.main([*FLAGS, "--output", str(tmp_path / "results.csv")])


def test_what_is_said_twice_counts_once(evaluated, capsys):
    evaluated("--seeds", "0", "0", "--bits", "4", "4")
    assert "±" not in capsys.readouterr().out
