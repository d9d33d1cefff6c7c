"""Training with --weights: what it begins with, what it may be resumed as, and that two processes are one with the joint batch.

Bit-equal resuming is in test_example_resuming.py, with COMPRESSIONS' `po2plus` and `both`."""

import options
import pytest
import torch
import weights
from models import create_model
from small_runs import torchrun
from torch import nn

import quantize


def trained(name, tmp_path):
    return torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]


def test_begins_with_the_full_precision_checkpoint(train, tmp_path):
    train("full", "--epochs", "1")
    flags = ["--weights", "po2", "--init-from", tmp_path / "full" / "last.pt", "--float-layers", "conv1", "layer3.*"]
    _, last, log = train("qat", *flags, "--epochs", "1", "--lr", "0")
    full = trained("full", tmp_path)
    assert torch.equal(last["model"]["fc.parametrizations.weight.original"], full["fc.weight"])
    assert torch.equal(last["model"]["conv1.weight"], full["conv1.weight"]) and "layer3.0.conv1.weight" in last["model"]
    assert log[0]["test_top1"] is not None


def test_resuming_needs_no_first_checkpoint(train, tmp_path):
    train("full", "--epochs", "1")
    flags = ["--weights", "po2", "--init-from", tmp_path / "full" / "last.pt"]
    _, whole, _ = train("whole", *flags, "--gather-checkpoints")
    (tmp_path / "full" / "last.pt").unlink()
    _, resumed, _ = train("rest", *flags, "--resume", tmp_path / "whole" / "epoch-0002.pt")
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--weights po2plus --weight-bits 3 --resume", "--resume: .* expected .*weights po2plus-3; the file holds .*weights po2plus-4"),
        ("--weights po2 --resume", "expected .*weights po2-4; the file holds .*weights po2plus-4"),
        ("--weights po2plus --weight-activation-bits 8 --resume", "expected .*weights po2plus-4-a8; the file holds .*weights po2plus-4"),
        ("--resume", "expected .*weights float; the file holds .*weights po2plus-4"),
        ("--weights po2plus --init-from", "--init-from: .* expected .*weights float; the file holds .*weights po2plus-4"),
    ],
)
def test_checkpoint_with_other_weights(train, tmp_path, flags, message):
    train("run", "--epochs", "1", "--weights", "po2plus")
    with pytest.raises(ValueError, match=message):
        train("other", *flags.split(), tmp_path / "run" / "last.pt")


def test_checkpoints_from_before_weights_had_bits(train, tmp_path):
    train("run", "--epochs", "1")
    old = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del old["identity"]["weights"]
    torch.save(old, tmp_path / "old.pt")
    assert train("again", "--epochs", "1", "--resume", tmp_path / "old.pt")[0] == 0


def test_unknown_layer():
    model = create_model("resnet20", 10, width=4)
    with pytest.raises(ValueError, match=r"--float-layers: expected globs over names from conv1 to fc; got 'head', which fits none"):
        weights.prepare(model, options.parse(["--weights", "po2", "--float-layers", "fc", "head"]))


def test_relative_mse():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2, 4, 3.5], [0, 0, 0, 8]])
    model = quantize.prepare(model, quantize.PowerOfTwo(4, scale="max"))
    quantized, latent = (weight.detach() for weight in (model[0].weight, model[0].parametrizations.weight.original))
    expected = (quantized - latent).square().sum() / (21 + 3.5**2 + 64)
    assert weights.relative_mse(model) == pytest.approx(float(expected)) and expected > 0


def test_two_processes_are_one_with_the_joint_batch(train, tmp_path):
    """Up to the order of sums. One epoch: that order decides on which side of a ReLU a value near zero falls, and such differences grow;
    in float64 two processes and one stay equal to 1e-11 over all three epochs."""
    flags = ["--epochs", "1", "--weights", "po2plus", "--weight-activation-bits", "4"]
    output = torchrun("--workspace", str(tmp_path / "two"), "--sync-bn", "--batch-size", "16", *flags)
    assert "2 processes agree" in output
    train("one", *flags)
    one, two = trained("one", tmp_path), trained("two", tmp_path)
    assert list(one) == list(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_joint_statistics_matter(train, tmp_path):
    """What the test above compares does depend on the batch that statistics are taken over."""
    flags = ["--epochs", "1", "--weights", "po2plus"]
    for name, batch in (("whole", "32"), ("half", "16")):
        train(name, *flags, "--batch-size", batch)
    whole, half = trained("whole", tmp_path), trained("half", tmp_path)
    assert (whole["bn1.running_var"] - half["bn1.running_var"]).abs().max() > 1e-3
