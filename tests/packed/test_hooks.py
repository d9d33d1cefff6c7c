"""Hooks see what the prepared model's would: floats, of layers, of what is left of their batch norms, and of the modules around them."""

import copy

import pytest
import torch
from packed_models import inside
from torch import nn

import quantize
from quantize.packed.pending import Pending


class Block(nn.Module):
    def __init__(self, channels, residual):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.residual = residual

    def forward(self, x):
        out = self.conv(self.bn(x))
        return out + x if self.residual else out


class Pair(nn.Module):
    def __init__(self, residual=False, after=()):
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 16, 1), Block(16, residual), nn.Sequential(Block(16, residual), *after)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.path = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))

    def forward(self, x):
        return self.path(x) + x


def trained(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return model.eval()


def watch(model, name, seen, before=False):
    module = model.get_submodule(name)
    if before:
        return module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return module.register_forward_hook(lambda module, args, output: seen.append(output))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def inference():
    """With gradients, layers would hand on floats anyway."""
    with torch.no_grad():
        yield


CONFIG = {"*": quantize.XNOR(), "first": None}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["inner", "last", "last.0", "inner.conv", "last.0.conv", "last.0.bn"])
def test_hooks_after_conversion_see_floats(name, before):
    model = quantize.convert(quantize.prepare(trained(Pair()), CONFIG))
    assert model.inner.conv._next is model.last[0].conv
    for packed in (model, copy.deepcopy(model)):
        want, seen = packed(X), []
        handle = watch(packed, name, seen, before)
        assert torch.equal(packed(X), want) and seen[0].dtype == torch.float32 and seen[0].shape == (2, 16, 8, 8)
        handle.remove()
        assert torch.equal(packed(X), want) and len(seen) == 1


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["inner", "last", "last.0"])
def test_hooks_before_conversion_see_what_they_saw(name, before):
    prepared = quantize.prepare(trained(Pair(after=(nn.BatchNorm2d(16),))), CONFIG)
    seen = []
    watch(prepared, name, seen, before)
    want = prepared(X)
    packed = quantize.convert(prepared)
    del seen[1:]
    torch.testing.assert_close(packed(X), want)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])


def test_nothing_is_folded_across_a_watched_container():
    inside = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Sequential(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8))
    for module in inside[:2]:
        module.register_forward_hook(lambda module, args, output: None)
    packed = quantize.convert(quantize.prepare(trained(inside), quantize.Uniform(4)))
    assert type(packed[0][1]) is nn.Identity and type(packed[2]) is nn.BatchNorm2d


@pytest.mark.parametrize("name", ["path", "path.1", "path.2"])
def test_hooks_do_not_see_a_sum_that_is_pending(name):
    model, seen = quantize.convert(quantize.prepare(trained(Sum()), quantize.XNOR())), []
    for packed in (model, copy.deepcopy(model)):
        with inside(packed):
            assert isinstance(packed.path(IMAGE), Pending)
        want = packed(IMAGE)
        handle = watch(packed, name, seen)
        assert torch.equal(packed(IMAGE), want) and type(seen[-1]) is torch.Tensor and torch.equal(seen[-1] + IMAGE, want)
        handle.remove()
        with inside(packed):
            assert isinstance(packed.path(IMAGE), Pending)


def test_hooks_of_all_modules_see_floats(tmp_path):
    pair, total = quantize.prepare(trained(Pair()), CONFIG), quantize.prepare(trained(Sum()), quantize.XNOR())
    quantize.save(quantize.convert(pair), tmp_path / "f")
    models = [(quantize.convert(pair), X), (quantize.load(Pair(), tmp_path / "f"), X), (quantize.convert(total), IMAGE)]
    seen = []
    for model, x in models:
        want = model(x)
        handles = [
            nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output)),
            nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(args[0])),
        ]
        try:
            assert torch.equal(model(x), want)
        finally:
            for handle in handles:
                handle.remove()
    assert {type(tensor) for tensor in seen} == {torch.Tensor} and {tensor.dtype for tensor in seen} == {torch.float32}


def test_hooks_of_loaded_models_see_floats(tmp_path):
    quantize.save(quantize.convert(quantize.prepare(trained(Pair()), CONFIG)), tmp_path / "f")
    model, seen = quantize.load(Pair(), tmp_path / "f"), []
    want = model(X)
    watch(model, "inner", seen)
    watch(model, "last.0.bn", seen)
    assert torch.equal(model(X), want) and [tensor.dtype for tensor in seen] == [torch.float32] * 2
