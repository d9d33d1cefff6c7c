import json
import os
import signal
import subprocess
import sys
import time

import checkpoint
import engine
import pytest
import torch
from small_runs import COMPRESSIONS, EXAMPLES, SMALL, environment, torchrun

TIMES = {"seconds", "step_ms", "peak_mib"}


def numbers(log):
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in log]


def assert_same(left, right, where="checkpoint"):
    """Bitwise equality of two checkpoints, naming the first place that differs."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert left == right, where


@pytest.fixture
def interrupt(monkeypatch):
    """Function making Ctrl-C arrive during the nth step from now on."""

    def during(step):
        original, count = engine.train_step, [0]

        def patched(*arguments):
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGINT)
            original(*arguments)

        monkeypatch.setattr(engine, "train_step", patched)

    return during


def test_log_and_checkpoints(train, tmp_path):
    status, last, log = train("run", "--gather-checkpoints", "--label-smoothing", "0.1", "--lr-scheduler", "step")
    assert status == 0 and last["epoch"] == 3 and last["step"] == 0
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    names = {"train_loss", "train_top1", "test_loss", "test_top1", "lr", "saved_mib_per_image", *TIMES}
    assert all(names <= set(entry) for entry in log)
    assert [entry["lr"] for entry in log] == pytest.approx([0.05 * 2.5 / 3, 0.005, 0.0005])
    assert last["best"] == max(entry["test_top1"] for entry in log)
    files = {file.name for file in (tmp_path / "run").glob("*.pt")}
    assert files == {"last.pt", "best.pt", "epoch-0001.pt", "epoch-0002.pt", "epoch-0003.pt"}
    assert not list((tmp_path / "run").glob(".*"))
    assert_same(last, torch.load(tmp_path / "run" / "epoch-0003.pt", weights_only=True))


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=list(COMPRESSIONS))
def test_resume_after_an_epoch(train, tmp_path, compression):
    _, whole, log = train("whole", "--gather-checkpoints", *compression)
    _, resumed, rest = train("rest", "--resume", tmp_path / "whole" / "epoch-0001.pt", *compression)
    assert_same(whole, resumed)
    assert numbers(log) == numbers(rest)  # what came before it, too


@pytest.mark.parametrize(
    ("compression", "step"),
    [*((name, 5) for name in COMPRESSIONS), ("plain", 6)],  # inside the second epoch, and in its last step
)
def test_interrupt_inside_an_epoch(train, tmp_path, compression, interrupt, step):
    compression = COMPRESSIONS[compression]
    _, whole, log = train("whole", *compression)
    interrupt(step)
    status, broken, begun = train("run", *compression)
    assert status == 130
    assert (broken["epoch"], broken["step"], len(begun)) == (1, step - 3, 1)
    _, resumed, ended = train("run", "--resume", tmp_path / "run" / "last.pt", *compression)
    assert_same(whole, resumed)
    assert numbers(log) == numbers(ended)


def test_interrupt_from_outside(tmp_path):
    flags = [*SMALL, "--workspace", str(tmp_path), "--epochs", "2000"]
    process = subprocess.Popen([sys.executable, EXAMPLES / "train.py", *flags], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"continue with --resume {tmp_path / 'last.pt'}" in output
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] >= 1


def test_second_interrupt_kills():
    from interrupt import StopRequest

    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a launcher's copy of the first
        assert stop.requested
        time.sleep(0.6)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    file = tmp_path / "last.pt"
    checkpoint.write({"value": 1}, file)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoint.write({"value": lambda: None}, file)
    assert torch.load(file, weights_only=True) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("flags", "held"),
    [("--arch resnet32", "arch resnet20"), ("--width 8", "width 4"), ("--num-classes 11", "num_classes 10")],
)
def test_checkpoint_of_another_model(train, tmp_path, flags, held):
    train("run", "--epochs", "1")
    asked = flags[2:].replace("-", "_")
    with pytest.raises(ValueError, match=f"is of another model: expected .*{asked}.*; the file holds .*{held}"):
        train("other", "--resume", tmp_path / "run" / "last.pt", *flags.split())


def test_bad_checkpoints(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file; there is none at .*nothing.pt"):
        train("run", "--resume", tmp_path / "nothing.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    with pytest.raises(ValueError, match=r"noise.pt is damaged or no checkpoint"):
        train("run", "--resume", tmp_path / "noise.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign.pt to be a checkpoint of this script .*got \['state_dict'\]"):
        train("run", "--resume", tmp_path / "foreign.pt")


def test_resume_with_other_options_says_so(train, tmp_path, interrupt):
    interrupt(2)
    train("run")
    with pytest.warns(UserWarning, match=r"other options .*: limit_test 37 -> 36; lr 0.05 -> 0.01$"):
        train("other", "--resume", tmp_path / "run" / "last.pt", "--lr", "0.01", "--limit-test", "36", "--num-workers", "0", "-j", "1")
    with pytest.raises(
        ValueError, match=r"inside an epoch, at step 2 of 1 processes with batches of 32; got 1 processes with batches of 16"
    ):
        train("other", "--resume", tmp_path / "run" / "last.pt", "--batch-size", "16")


@pytest.mark.parametrize("flags", [[], ["-c", "quantize", "--ibits", "2"]], ids=["plain", "fixed"])
def test_nonfinite_loss_names_the_layer(train, monkeypatch, tmp_path, flags):
    original, count = engine.train_step, [0]

    def poisoned(run, *batch):
        count[0] += 1
        if count[0] == 5:
            run.model.layer2[1].conv1.weight.data[0, 0, 0, 0] = float("inf")
        original(run, *batch)

    monkeypatch.setattr(engine, "train_step", poisoned)
    message = (
        r"loss is nan at step 2 of epoch 2; the first layer to make it is layer2.1.conv1 \(\w*Conv2d\): its weight had become so before"
    )
    with pytest.raises(FloatingPointError, match=message):
        train("run", *flags)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


def test_nonfinite_causes():
    from nonfinite import first_nonfinite
    from torch import nn

    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    images = torch.tensor([[-1.0]])
    assert "loss itself overflowed" in first_nonfinite(nn.Sequential(nn.Identity()), images)
    assert "is 1 (Root): its input and parameters are finite" in first_nonfinite(nn.Sequential(nn.Identity(), Root()), images)
    assert "input batch itself" in first_nonfinite(nn.Sequential(nn.Identity()), images / 0)


@pytest.mark.parametrize(
    "flags", [["--amp", "bf16"], ["--channels-last"], ["-j", "2"], ["--amp", "bf16", "--channels-last", "-c", "quantize"]]
)
def test_variants_train(train, flags):
    _, _, log = train("run", "--epochs", "2", *flags)
    assert log[-1]["train_loss"] < 3


def test_saved_bytes_shrink(train):
    """Fixed 2 bits with groups of 256 are an eighth of the plain model's bytes at least; batch norm and ReLU included."""
    _, _, plain = train("plain", "--epochs", "1", "--width", "16")
    _, _, packed = train("packed", "--epochs", "1", "--width", "16", "-c", "quantize", "--ibits", "2")
    assert packed[0]["saved_mib_per_image"] < plain[0]["saved_mib_per_image"] / 8


def test_training_only(train, tmp_path):
    _, _, log = train("run", "--training-only", "--epochs", "1")
    assert log[0]["test_top1"] is None
    assert not (tmp_path / "run" / "best.pt").exists()


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


@pytest.mark.parametrize("step", [2, 3], ids=["inside an epoch", "behind its last step"])
def test_time_before_a_stop_counts(train, tmp_path, interrupt, monkeypatch, step):
    clock = [0.0]

    def tick():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    interrupt(step)
    _, stopped, _ = train("run", "--epochs", "1")
    before, steps = stopped["clock"]
    assert stopped["step"] == len(steps) == step and before > sum(steps) >= step
    monkeypatch.undo()
    _, finished, log = train("run", "--epochs", "1", "--resume", tmp_path / "run" / "last.pt")
    assert log[0]["seconds"] > before and finished["clock"] == [0.0, []]
    assert log[0]["step_ms"] == 1000.0  # most steps were before the stop
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["duration_seconds"] == log[0]["seconds"]


def test_a_single_image_is_too_few_for_some_networks(train):
    with pytest.raises(
        ValueError, match="--batch-size: expected a size other than 79, with which a batch of an epoch has a single image: "
    ):
        train("run", "--arch", "resnet18", "--batch-size", "79")
    assert train("other", "--batch-size", "79", "--epochs", "1")[0] == 0  # these batch norms see more than a pixel


def test_fewer_images_than_processes():
    import options
    import train as script
    from processes import Processes

    with pytest.raises(ValueError, match="--limit-train: expected an image for each of 2 processes at least; got 1"):
        script.prepare(options.parse([*SMALL, "--limit-train", "1"]), Processes(0, 2, torch.device("cpu")))


def test_a_run_is_not_lost_unasked(train, tmp_path):
    train("run", "--epochs", "1", "--weights", "po2")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=r"--workspace: .*run holds a run; go on with it \(--resume .*last.pt\), .* \(--overwrite\)"):
        train("run", "--epochs", "1")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before
    train("run", "--epochs", "1", "--overwrite")
    assert not (tmp_path / "run" / "model.safetensors").exists()  # the plain run has none


def test_going_on_elsewhere_takes_all_along(train, tmp_path):
    flags = ("--epochs", "2", "--lr", "0.3")
    _, whole, log = train("first", *flags)
    _, resumed, taken = train("second", *flags, "--resume", tmp_path / "first" / "last.pt")  # finished already
    assert numbers(log) == numbers(taken)
    assert_same(whole, resumed)
    best = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("first", "second")]
    assert best[0]["epoch"] == best[1]["epoch"]
    assert json.loads((tmp_path / "second" / "report.json").read_text())["last_top1"] == log[-1]["test_top1"]


def test_resuming_with_another_decay(train, tmp_path):
    train("run", "--epochs", "1")
    with pytest.warns(UserWarning, match="momentum 0.9 -> 0.1; weight_decay 0.0001 -> 0.5"):
        _, content, _ = train(
            "run", "--epochs", "2", "--resume", tmp_path / "run" / "last.pt", "--weight-decay", "0.5", "--momentum", "0.1"
        )
    assert [(group["momentum"], group["weight_decay"]) for group in content["optimizer"]["param_groups"]] == [(0.1, 0.5)]


def test_resuming_with_a_scaler(train, tmp_path):
    train("run", "--epochs", "1")
    with pytest.warns(UserWarning, match="amp off -> fp16"):
        status, content, _ = train("run", "--epochs", "2", "--resume", tmp_path / "run" / "last.pt", "--amp", "fp16")
    assert status == 0
    assert content["epoch"] == 2


def test_a_kill_before_the_last_checkpoint(train, monkeypatch, tmp_path):
    save = checkpoint.save

    def killed(run, file):
        if file.name == "last.pt" and run.epoch == 2:
            raise KeyboardInterrupt
        save(run, file)

    _, _, log = train("whole", "--lr", "0.3", "--gather-checkpoints")
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train("run", "--lr", "0.3", "--gather-checkpoints")
    monkeypatch.setattr(checkpoint, "save", save)
    _, _, resumed = train("run", "--lr", "0.3", "--gather-checkpoints", "--resume", tmp_path / "run" / "last.pt")
    assert numbers(log) == numbers(resumed)
    for name in ("best.pt", "epoch-0001.pt", "epoch-0002.pt"):
        one, other = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("whole", "run"))
        assert (one["epoch"], one["best"]) == (other["epoch"], other["best"])


@pytest.mark.parametrize("flags", [[], ["--training-only"]], ids=["tested", "training only"])
def test_weights_broken_by_the_last_step_replace_nothing(train, monkeypatch, tmp_path, flags):
    original, count = engine.train_step, [0]

    def poisoned(run, *batch):
        original(run, *batch)
        count[0] += 1
        if count[0] == 6:  # the second epoch's last
            run.model.layer1[0].conv1.weight.data[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="layer1.0.conv1.weight is not finite after epoch 2; the checkpoint is of before it"):
        train("run", *flags)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


def test_evaluation_is_of_the_checkpoint(train, tmp_path, capsys):
    import train as script

    flags = ["--arch", "resnet20_q", "--weights", "xnor", "--batch-size", "16", "--seed", "3", "--epochs", "1"]
    _, _, log = train("run", *flags)
    capsys.readouterr()
    script.main(["--evaluate", "--resume", str(tmp_path / "run" / "last.pt"), "--limit-test", "37"])
    assert f"top-1 {log[-1]['test_top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (["--dataset", "cifar10", "--data-path", "nowhere"], 2, "train.py: dataset cifar10: expected the file"),
        (["--resume", "nothing.pt"], 2, "train.py: --resume: expected a checkpoint file; there is none at nothing.pt"),
        (["--lr", "1e30", "--lr-warmup-epochs", "0"], 1, "train.py: "),
    ],
)
def test_what_is_at_fault_is_said_in_a_line(tmp_path, flags, status, text):
    command = [sys.executable, EXAMPLES / "train.py", *SMALL, "--workspace", tmp_path / "run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert text in done.stderr


def test_two_processes(train, tmp_path, capsys):
    """With adaptive bits: equal parameters at the end, and tests that count each of the 37 images once, as one process does."""
    flags = ["-c", "quantize"]
    output = torchrun("--workspace", str(tmp_path / "two"), *flags)
    assert "2 processes agree" in output
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    train("one", "--evaluate", "--resume", tmp_path / "two" / "last.pt", *flags)
    words = capsys.readouterr().out.split()
    assert float(words[-4]) == pytest.approx(log[-1]["test_loss"], abs=1e-3)
    assert float(words[-2]) == pytest.approx(log[-1]["test_top1"], abs=0.01)


def test_a_loss_that_another_process_cannot_go_on_from(train, monkeypatch):
    # The others would wait for it in the backward pass. One process stands in for two.
    monkeypatch.setattr("processes.Processes.any", lambda self, flag: sys._getframe(1).f_code.co_name == "train_step")
    with pytest.raises(FloatingPointError, match=r"loss is [\d.]+ at step 1 of epoch 1, but not finite in another process"):
        train("run")
