"""train.py: what a run writes down, what stops it, and several processes."""

import json
import subprocess
import sys

import engine
import pytest
import torch
from small_runs import EXAMPLES, SMALL, TIMES, assert_same, environment, torchrun


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


def test_tensorboard_has_the_numbers_of_the_log(train, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, _, log = train("run", "--epochs", "2")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for tag in ("train_loss", "train_top1", "test_loss", "test_top1"):
        found = events.Scalars(tag)
        assert [event.step for event in found] == [0, 1]
        assert [event.value for event in found] == pytest.approx([entry[tag] for entry in log], rel=1e-6)


def test_saved_bytes_shrink(train):
    """Fixed 2 bits with groups of 256 are an eighth of the plain model's bytes at least; batch norm and ReLU included."""
    _, _, plain = train("plain", "--epochs", "1", "--width", "16")
    _, _, packed = train("packed", "--epochs", "1", "--width", "16", "-c", "quantize", "--ibits", "2")
    assert packed[0]["saved_mib_per_image"] < plain[0]["saved_mib_per_image"] / 8


def test_training_only(train, tmp_path):
    _, _, log = train("run", "--training-only", "--epochs", "1")
    assert log[0]["test_top1"] is None
    assert not (tmp_path / "run" / "best.pt").exists()


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
