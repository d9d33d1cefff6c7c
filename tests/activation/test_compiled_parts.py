"""Parts of a QModule that are compiled by themselves, and reports of compiled models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import ActivationConfig

FIXED, ADAPTIVE = ActivationConfig(bits=2, max_bits=2), ActivationConfig()
ONCE = ActivationConfig(bits=2, max_bits=2, compress_once=True)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x))) + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(8), Block(8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.gelu(self.blocks(self.stem(x))).mean((2, 3)))


def whole(config):
    return torch.compile(quantize.QModule(Net(), config), backend="aot_eager")


def in_place(config):
    model = quantize.QModule(Net(), config)
    model.compile(backend="aot_eager")
    return model


def before(config):
    return quantize.QModule(torch.compile(Net(), backend="aot_eager"), config)


def block_before(config):
    model = Net()
    model.blocks[0] = torch.compile(model.blocks[0], backend="aot_eager")
    return quantize.QModule(model, config)


def block_after(config):
    model = quantize.QModule(Net(), config)
    model.blocks[0] = torch.compile(model.blocks[0], backend="aot_eager")
    return model


def blocks_in_place(config):
    model = quantize.QModule(Net(), config)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


def forward_alone(config):
    model = quantize.QModule(Net(), config)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


@pytest.mark.parametrize("config", [FIXED, ADAPTIVE, ONCE], ids=["fixed", "adaptive", "once"])
@pytest.mark.parametrize("make", [whole, in_place, before, block_before, block_after, blocks_in_place, forward_alone])
def test_trains_and_is_reported(make, config):
    model, x, y = make(config), torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    for _ in range(2):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    report = quantize.memory_report(model, x)
    assert report.ratio > 6  # as if nothing were compiled: then it is the model's whose functional calls are compressed too
    assert report.baseline_bytes == quantize.memory_report(Net(), x).saved_bytes
    assert quantize.variance_report(model, [(x, y)], F.cross_entropy, draws=2).quantization > 0
    with torch.no_grad():
        assert model.eval()(x).shape == (8, 4)


def test_what_is_compiled_keeps_few_bits():
    saved = []
    model, x = block_after(FIXED), torch.randn(8, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).sum().backward()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in own}
    assert sum(kept.values()) < quantize.memory_report(Net(), x).saved_bytes / 5


def test_traced_in_evaluation():
    model = quantize.QModule(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), FIXED).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    model.requires_grad_()
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
