"""train.py goes on: to the very same numbers, from wherever it was stopped, and loses nothing."""

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
from small_runs import COMPRESSIONS, EXAMPLES, SMALL, assert_same, numbers


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
        train("third", "--resume", tmp_path / "run" / "last.pt", "--batch-size", "16")


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
