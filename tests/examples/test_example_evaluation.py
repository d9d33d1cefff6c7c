"""train.py --evaluate: accuracy and gradient variances of a checkpoint."""

import pytest
from small_runs import SMALL


@pytest.mark.parametrize(
    "flags",
    [
        ["--arch", "lenet", "--weights", "diffq", "--group-size", "4", "--penalty", "3", "--min-bits", "3"],
        ["--arch", "resnet20_q", "--weights", "dorefa", "--activation-bits", "32", "--gradient-bits", "6", "--float-layers"],
        ["--arch", "resnet20_q", "--weights", "xnor", "--rectify", "0.99"],
        ["--weights", "po2", "--weight-bits", "3", "--activation-bits", "8", "--float-layers", "conv1", "fc"],
    ],
    ids=["diffq", "dorefa", "xnor", "po2"],
)
def test_evaluate_knows_the_model_from_the_checkpoint(train, tmp_path, capsys, flags):
    import train as train_script

    _, _, log = train("run", *flags, "--epochs", "1", "--reestimate-bn", "0")
    capsys.readouterr()
    last = ["--evaluate", "--resume", str(tmp_path / "run" / "last.pt")]
    assert train_script.main([*last, "--limit-test", "37", "--reestimate-bn", "0", "--device", "cpu"]) == 0
    assert f"{log[-1]['test_loss']:.4f}" in capsys.readouterr().out
    for other in (["--width", "8"], ["--weights", "lsq"], ["--dataset", "mnist5k"]):  # what is given counts
        with pytest.raises(ValueError, match="is of another model"):
            train_script.main([*last, *other, "--limit-train", "80", "--limit-test", "37", "--device", "cpu"])


def test_evaluate(train, tmp_path, capsys):
    _, _, log = train("run")
    train("again", "--evaluate", "--resume", tmp_path / "run" / "last.pt")
    assert f"test loss {log[-1]['test_loss']:.4f}  top-1 {log[-1]['test_top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--ibits", "2"], ["--usegradient"]], ids=["fixed", "gradient"])
def test_variances(train, tmp_path, capsys, flags):
    train("run", "-c", "quantize", *flags)
    last = tmp_path / "run" / "last.pt"
    evaluate = ["--evaluate", "--training-only", "--resume", last, "--batches", "2", "--draws", "3"]
    capsys.readouterr()
    train("again", *evaluate, "-c", "quantize", *flags, "--resume2", last)
    words = capsys.readouterr().out.split(": ")[1].split()
    found = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    assert list(found) == ["Overall", "Quant", "Sample"]
    assert found["Overall"] == pytest.approx(found["Quant"] + found["Sample"], rel=1e-4)
    assert found["Quant"] > 0 and found["Sample"] > 0


def test_variances_of_several_processes_are_of_their_mean_gradient(train, tmp_path, monkeypatch):
    import options
    import report
    import train as script
    from processes import Processes

    train("run", "--epochs", "1")
    last = str(tmp_path / "run" / "last.pt")
    flags = [*SMALL, "-c", "quantize", "--ibits", "2", "--evaluate", "--training-only", "--resume", last, "--batches", "2", "--draws", "2"]
    one, loader, _ = script.prepare(options.parse(flags), Processes.start("cpu"))
    alone = report.variances(one, loader)
    run, loader, _ = script.prepare(options.parse(flags), Processes.start("cpu"))
    run.processes.world = 4
    monkeypatch.setattr(Processes, "total", lambda self, values: values * (1 + 2 + 3 + 4))  # the others have more
    joint = report.variances(run, loader)
    assert joint == pytest.approx({name: value * 10 / 16 for name, value in alone.items()})


def test_adaptive_state_of_a_plain_run(train, tmp_path):
    train("run", "--epochs", "1")
    last = tmp_path / "run" / "last.pt"
    with pytest.raises(ValueError, match=r"--resume2: expected a run with compressed activations; .*last.pt is of one without"):
        train("run", "--evaluate", "--training-only", "--resume", last, "--resume2", last, "-c", "quantize")
    with pytest.raises(FileNotFoundError, match="--resume2: expected a checkpoint file"):
        train("run", "--evaluate", "--training-only", "--resume", last, "--resume2", tmp_path / "no.pt", "-c", "quantize")


def test_evaluation_is_of_the_checkpoint(train, tmp_path, capsys):
    import train as script

    flags = ["--arch", "resnet20_q", "--weights", "xnor", "--batch-size", "16", "--seed", "3", "--epochs", "1"]
    _, _, log = train("run", *flags)
    capsys.readouterr()
    script.main(["--evaluate", "--resume", str(tmp_path / "run" / "last.pt"), "--limit-test", "37"])
    assert f"top-1 {log[-1]['test_top1']:.2f} %" in capsys.readouterr().out
