"""allocate.py: the comparison, what it leaves, how it goes on, budgets, and flags that do not fit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import allocate
import allocation_plots
import allocations
import engine
import pytest
import torch
import train as train_script
from allocations import Budget
from models import create_model
from small_runs import EXAMPLES, environment

import quantize
from quantize.mixed_precision.survey import Survey

pandas = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
TINY = "--arch lenet --dataset digits --width 4 --limit-train 80 --limit-test 37 --batch-size 32 --device cpu"
TINY += " --epochs 1 --float-epochs 2 --samples 24"
METHODS = ["uniform", "zeroq", "gauss_newton", "composed"]
BUDGETS = ["2.5 bits", "4 bits"]
FLAGS = f"--average-bits 2.5 4 --methods {' '.join(METHODS)}"


def test_every_method_has_a_style():
    assert set(allocation_plots.STYLES) == set(allocations.METHODS)


def main(workspace, flags=""):
    """Exit status, and the report if there is one."""
    status = allocate.main([*TINY.split(), *flags.split(), "--workspace", str(workspace)])
    file = workspace / "report.json"
    return status, json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workspace with two budgets for three methods, and its report."""
    workspace = tmp_path_factory.mktemp("allocate")
    status, report = main(workspace, FLAGS)
    assert status == 0
    return workspace, report


@pytest.fixture
def from_float(finished, tmp_path):
    """Function running the script in a workspace of its own with that one's float model."""
    return lambda flags="", name="run": main(tmp_path / name, f"--init-from {finished[1]['init_from']} {flags}")


@pytest.fixture
def at_call(monkeypatch):
    """Function making Ctrl-C arrive in the nth call of a function or method from now on."""

    def patch(owner, name, number):
        original, count = getattr(owner, name), [0]

        def patched(*arguments, **keywords):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGINT)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, patched)
        return count

    return patch


def test_every_method_at_every_budget(finished):
    _, report = finished
    rows = report["rows"]
    assert [(row["method"], row["budget"]) for row in rows] == [(method, budget) for budget in BUDGETS for method in METHODS]
    for row in rows:
        assert row["stored_bytes"] == row["predicted_bytes"] <= row["max_bytes"] < report["float"]["bytes"]
        assert row["file_bytes"] == Path(row["file"]).stat().st_size > row["stored_bytes"]
        assert row["true_kl"] > 0 and row["bit_ops"] > 0
        assert all(0 <= row[f"top1_{when}"] <= 100 for when in ("before", "after", "packed"))
        if row["method"] != "uniform":
            assert row["lower_bound"] <= row["objective"] + 1e-12 and row["proven"]
    by = {(row["method"], row["budget"]): row for row in rows}
    assert [by["uniform", budget]["uniform"] for budget in BUDGETS] == ["w2", "w4"]
    assert by["uniform", "4 bits"]["stored_bytes"] == by["uniform", "4 bits"]["max_bytes"]
    for method in METHODS[1:]:  # more bytes are not predicted to be worse
        assert by[method, "4 bits"]["objective"] <= by[method, "2.5 bits"]["objective"]
    assert set(report["sensitivities"]) == set(METHODS[1:])
    assert all(numbers["seconds"] > 0 for numbers in report["sensitivities"].values())


def test_files_hold_the_chosen_bits(finished):
    for row in finished[1]["rows"]:
        packed = quantize.load(create_model("lenet", 10, 1, width=4), row["file"])
        bits = {layer.name: layer.bits for layer in quantize.size_report(packed).layers}
        assert bits == {layer: weight for layer, (weight, _) in row["choice"].items()}
        folder = Path(row["file"]).parent
        assert not list(folder.glob("*.pt")) and (folder / "numbers.json").exists()


def test_sensitivities_are_those_of_the_float_model(finished):
    for method, numbers in finished[1]["sensitivities"].items():
        sensitivity = quantize.Sensitivity.load(numbers["file"])
        sensitivity.check_model(create_model("lenet", 10, 1, width=4))
        assert (sensitivity.method, sensitivity.metric) == allocations.METHODS[method]
        assert sensitivity.samples == 24 and sensitivity.choices == ((2, None), (4, None), (8, None))


def test_table_and_pictures(finished):
    workspace, report = finished
    table = pandas.read_csv(workspace / "table.csv")
    assert list(table) == list(allocate.COLUMNS) and len(table) == len(report["rows"])
    assert table.file_bytes.tolist() == [row["file_bytes"] for row in report["rows"]]
    for name in ("accuracy.png", "layers-2.5-bits.png", "layers-4-bits.png"):
        assert (workspace / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_done_twice(finished, monkeypatch, capsys):
    workspace, report = finished
    for owner, name in ((train_script, "train"), (quantize, "measure_sensitivity")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("done again"))
    assert main(workspace, FLAGS)[0] == 0
    again = json.loads((workspace / "report.json").read_text())
    for row in (*report["rows"], *again["rows"]):
        row.pop("search_seconds", None)
    assert again == report and "w2 in all layers is the most that fits" in capsys.readouterr().out


def test_other_recipes_are_fine_tuned_anew(finished, from_float):
    _, report = from_float("--methods uniform --average-bits 4 --lr 0.5")
    before, after = (r["rows"][-1] for r in (finished[1] | {"rows": [r for r in finished[1]["rows"] if r["method"] == "uniform"]}, report))
    assert before["true_kl"] == after["true_kl"] and before["choice"] == after["choice"]
    names = [Path(row["file"]).parent.name for row in (before, after)]
    assert names[0] != names[1] and Path(before["file"]).read_bytes() != Path(after["file"]).read_bytes()


def test_pairs_made_positive(from_float):
    _, report = from_float("--methods clado_kl clado_positive --average-bits 3")
    raw, positive = (report["sensitivities"][method] for method in ("clado_kl", "clado_positive"))
    assert raw == positive and [row["method"] for row in report["rows"]] == ["clado_kl", "clado_positive"]
    sensitivity = quantize.Sensitivity.load(raw["file"])
    for row, used in zip(report["rows"], (sensitivity, sensitivity.saturated().projected()), strict=True):
        choice = {layer: tuple(bits) for layer, bits in row["choice"].items()}
        x = used.one_hot(choice)
        assert row["objective"] == pytest.approx(float(x @ used.matrix @ x))


def test_interrupted_measuring_goes_on(from_float, at_call, tmp_path, capsys):
    flags = "--methods clado --average-bits 3"
    _, whole = from_float(flags, "whole")
    passes = at_call(Survey, "_passed", 20)  # of the second choice of the first layer; each has one pass, and three with each later layer
    assert from_float(flags) == (130, None)
    assert passes[0] == 20 and len(list((tmp_path / "run").glob("*.partial"))) == 1
    assert "stopped; the same command goes on" in capsys.readouterr().out
    _, report = from_float(flags)
    assert passes[0] == 20 + 3 * sum(1 + 3 * later for later in range(5)) - 13
    assert not list((tmp_path / "run").glob("*.partial"))
    matrices = [quantize.Sensitivity.load(r["sensitivities"]["clado"]["file"]).matrix for r in (whole, report)]
    assert torch.equal(*matrices) and whole["rows"][0]["choice"] == report["rows"][0]["choice"]
    assert report["sensitivities"]["clado"]["seconds"] is None and whole["sensitivities"]["clado"]["seconds"] > 0


def test_interrupted_fine_tuning_goes_on(from_float, at_call):
    """Two models of an epoch of three steps each; the second one is interrupted."""
    flags = "--methods uniform --average-bits 2 4"
    _, whole = from_float(flags, "whole")
    steps = at_call(engine, "train_step", 5)
    assert from_float(flags) == (130, None)
    assert steps[0] == 5
    _, report = from_float(flags)
    assert steps[0] == 6
    for row, other in zip(whole["rows"], report["rows"], strict=True):
        assert Path(row.pop("file")).read_bytes() == Path(other.pop("file")).read_bytes()
        assert row == other


def test_interrupted_float_training_goes_on(tmp_path, at_call):
    steps = at_call(engine, "train_step", 4)
    flags = "--methods uniform --average-bits 2"
    assert main(tmp_path, flags) == (130, None)
    status, report = main(tmp_path, flags)
    assert status == 0 and steps[0] == 2 * 3 + 3 and Path(report["init_from"]).parent.parent == tmp_path


def test_bits_of_inputs(from_float):
    """At most the bit operations of 3 x 5 bits; learned steps are calibrated and end in the file."""
    flags = "--methods uniform gauss_newton --activation-choices 4 8 --average-bits 3 --average-activation-bits 5"
    _, report = from_float(flags)
    equal, chosen = report["rows"]
    assert equal["uniform"] == "w2a4"  # w2a8 would have 16
    assert {tuple(choice) for choice in chosen["choice"].values()} <= {(w, a) for w in (2, 4, 8) for a in (4, 8)}
    macs = json.loads((Path(chosen["file"]).parent / "report.json").read_text())["macs"]
    assert equal["bit_ops"] == 8 * macs < chosen["bit_ops"] <= 15 * macs
    assert chosen["stored_bytes"] == chosen["predicted_bytes"] <= chosen["max_bytes"]


def test_layers_in_full_precision_and_kib(from_float):
    flags = "--methods zeroq --quantizer lsq --choices 8 2 --float-layers conv1 --max-kib 16"
    _, report = from_float(flags)
    (row,) = report["rows"]
    assert row["budget"] == "16 KiB" and row["max_bytes"] == 16384 >= row["stored_bytes"] == row["predicted_bytes"]
    assert "conv1" not in row["choice"] and {weight for weight, _ in row["choice"].values()} <= {2, 8}
    with pytest.raises(ValueError, match=r"--max-kib must be at least \d+\.\d\d, the smallest choice everywhere; got 1 KiB"):
        from_float(flags.replace("16", "1"))


def test_a_failed_fine_tuning_has_a_row(from_float, monkeypatch, capsys):
    def fail(*arguments):
        raise FloatingPointError("loss is nan at step 2 of epoch 1")

    monkeypatch.setattr(train_script, "train", fail)
    status, report = from_float("--methods uniform gauss_newton --average-bits 2.5")
    assert status == 1 and [row["failed"] for row in report["rows"]] == ["loss is nan at step 2 of epoch 1"] * 2
    assert "top1_before" in report["rows"][0] and "top1_after" not in report["rows"][0]
    output = capsys.readouterr().out
    assert "failed: loss is nan" in output
    table = output.split("top1_packed")[1]
    assert "failed" in table.splitlines()[0]
    assert table.count("loss is nan at step 2 of epoch 1") == 2
    assert ".0 " not in table  # whole bytes, gaps or not


@pytest.mark.slow
def test_two_processes(finished, from_float, tmp_path):
    """The perturbations are split, and give what one process measures."""
    flags = f"--init-from {finished[1]['init_from']} --methods gauss_newton zeroq --average-bits 3"
    _, one = from_float(flags, "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLES / "allocate.py"]
    command = [*launch, *TINY.split(), *flags.split(), "--workspace", tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row["choice"] == other["choice"] and row["objective"] == pytest.approx(other["objective"], rel=1e-9)
        assert row["true_kl"] == pytest.approx(other["true_kl"], rel=1e-5) and row["stored_bytes"] == other["stored_bytes"]


SIZES = {(2, 4): 110, (2, 8): 110, (4, 4): 210, (4, 8): 210, (8, 4): 410, (8, 8): 410}


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(2, 110), (2.5, 135), (3, 160), (4, 210), (5, 260), (8, 410)],
)
def test_average_bits_are_interpolated(bits, expected):
    args, _, _ = allocations.parse(["--average-bits", str(bits), "--activation-choices", "4", "8"])
    assert allocations.budgets_of(args, SIZES) == [Budget(f"{bits:g} bits", expected, None)]


@pytest.mark.parametrize(
    ("max_bytes", "max_product", "expected"),
    [(409, None, (4, 8)), (410, None, (8, 8)), (410, 32, (8, 4)), (410, 31, (4, 4)), (110, 8, (2, 4))],
)
def test_largest_uniform_choice(max_bytes, max_product, expected):
    assert allocations.largest_uniform(Budget("", max_bytes, max_product), SIZES) == expected


def test_options_of_fine_tuning_and_of_the_float_model():
    args, recipe, first = allocations.parse(["--arch", "resnet56", "--lr", "0.3", "--float-epochs", "7", "--methods", "zeroq", "zeroq"])
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.lr_warmup_epochs) == (0.3, 2, 64, 0)
    assert (first.lr, first.epochs, first.batch_size, first.lr_warmup_epochs) == (0.1, 7, 64, 1)
    assert args.methods == ["zeroq"] and args.average_bits == [2.5, 3, 4] and args.choices == [2, 4, 8]
    assert allocations.parse(["--average-bits", "3", "3", "2.5"])[0].average_bits == [3, 2.5]
    assert allocations.parse(["--max-kib", "9", "9"])[0].max_kib == [9]
    assert args.workspace == Path("runs/mnist5k-resnet56-allocate-seed0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods fisher", "argument --methods: invalid choice: 'fisher'"),
        ("--quantizer xnor", "argument --quantizer: invalid choice: 'xnor'"),
        ("--choices 2 9", "--choices must be different numbers from 2 to 8; got 2 9"),
        ("--choices 4 4", "--choices must be different numbers from 2 to 8; got 4 4"),
        ("--activation-choices 1", "--activation-choices must be different numbers from 2 to 8; got 1"),
        ("--choices 4 8", "--average-bits must be from 4 to 8, the bits of --choices; got 2.5"),
        ("--average-bits 9", "--average-bits must be from 2 to 8, the bits of --choices; got 9"),
        ("--average-bits nan", "--average-bits must be from 2 to 8, the bits of --choices; got nan"),
        ("--max-kib 0", "--max-kib must be above 0; got 0"),
        ("--max-kib inf", "--max-kib must be finite; got inf"),
        ("--max-kib 9 --average-bits 3", "not allowed with argument"),
        ("--average-activation-bits 4", "--average-activation-bits needs --activation-choices and --average-bits"),
        ("--activation-choices 4 8 --average-activation-bits 2", "--average-activation-bits must be from 4 to 8, the bits of"),
        ("--samples 0", "--samples must be at least 1; got 0"),
        ("--float-epochs 0", "--float-epochs must be at least 1; got 0"),
        ("--float-lr -1", "--float-lr must be at least 0; got -1"),
        ("--time-limit 0", "--time-limit must be at least 0.001; got 0"),
        ("--weights po2", "--weights does not belong here"),
        ("--training-only", "--training-only does not belong here"),
        ("--epochs 0", "--epochs must be at least 1; got 0"),
        ("--layers 4", "unrecognized arguments: --layers"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        allocations.parse(flags.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--samples 81", "--float-layers head", "--max-kib 1"])
def test_it_is_named_before_a_float_model_is_trained(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_script, "train", lambda *a: pytest.fail("trained"))
    with pytest.raises(ValueError, match=f"{flags.split()[0]} must "):
        main(tmp_path, flags)


def test_labels_of_plots_keep_off_the_axis(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    offsets, annotate = {}, Axes.annotate

    def noted(self, text, *arguments, **keywords):
        offsets[text] = keywords["xytext"]
        return annotate(self, text, *arguments, **keywords)

    monkeypatch.setattr(Axes, "annotate", noted)
    top1 = {"w2": 10.0, "w4": 97.0}
    rows = [
        {"method": "uniform", "uniform": name, "stored_bytes": 1024 * size, "top1_packed": value, "top1_before": value}
        for size, (name, value) in enumerate(top1.items(), 1)
    ]
    allocation_plots.accuracy(rows, {"top1": 98.0, "bytes": 9000}, "", tmp_path / "a.png")
    assert offsets["w2"][1] > 0 > offsets["w4"][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--samples 81", "--samples must be at most 80, the training images; got 81"),
        ("--float-layers conv1 head", r"--float-layers must match layers, from \w+ to \w+; 'head' matches none"),
        ("--init-from nothing.pt", "--init-from: expected a checkpoint file; there is none at nothing.pt"),
    ],
)
def test_what_does_not_fit_model_and_data_is_named(from_float, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        from_float(flags)
