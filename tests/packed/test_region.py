"""Parts of converted models that are called by themselves: floats, to the bit what the whole model has there."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from packed_models import inside
from test_binary_layers import trained_norms
from torch import nn

import quantize
from quantize.packed.pending import Pending
from quantize.packed.region import region_of

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Hardtanh(),
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16),
        nn.Hardtanh(),
        nn.Conv2d(16, 16, 3),
    )


def packed(config):
    model = quantize.prepare(trained_norms(network()).eval(), config)
    if isinstance(config, quantize.Uniform):
        quantize.calibrate(model, [X])
    return quantize.convert(model)


CONFIGS = [quantize.Uniform(8, activation_bits=8), {"*": quantize.XNOR(), "0": None}]


@pytest.mark.parametrize("config", CONFIGS, ids=["integers", "signs"])
def test_layer_by_layer(config):
    model = packed(config)
    with torch.no_grad():
        for _ in range(2):  # after the first call, layers know their usual one
            seen = [X]
            for layer in model:
                seen.append(layer(seen[-1]))
            assert all(type(x) is torch.Tensor and x.dtype == torch.float32 for x in seen)
            assert torch.equal(seen[-1], model(X))


def test_slices_and_other_models_around_it():
    model = packed(CONFIGS[0])

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = model

        def forward(self, x):
            found = [x]
            for layer in self.features:
                found.append(layer(found[-1]))
            return found, self.features(x)

    with torch.no_grad():
        parts, whole = Around()(X)
        assert all(type(x) is torch.Tensor for x in parts)
        assert torch.equal(parts[3], model[:3](X)) and torch.equal(parts[-1], whole)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own(again):
    model = packed(CONFIGS[0])
    other = again(model)
    assert region_of(other) is not region_of(model) and len(other._forward_hooks) == 1
    with torch.no_grad():
        with inside(model):
            assert isinstance(model[0](X), Pending) and type(other[0](X)) is torch.Tensor
        with inside(other):
            assert isinstance(other[0](X), Pending)
        assert torch.equal(other(X), model(X))


LOADED = """
import pickle, sys
import torch
from quantize.packed.region import region_of

with open(sys.argv[1], "rb") as file:
    model, x = pickle.load(file)
hooks = [model.register_forward_hook(lambda *_: None) for _ in range(100)]  # numbered from 0, as in every process
for hook in hooks:
    hook.remove()
with torch.no_grad():
    model(x)
assert not region_of(model).is_entered() and type(model[0](x)) is torch.Tensor
"""


def test_pickles_in_another_process(tmp_path):
    (tmp_path / "model").write_bytes(pickle.dumps((packed(CONFIGS[0]), X)))
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "model")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Opaque(nn.Module):
    """Which no trace can follow."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if float(x.sum()) == 0.5:
            return x
        return self.inner[:4](x), self.inner(x)


@pytest.mark.parametrize("config", CONFIGS, ids=["integers", "signs"])
def test_parts_within_a_forward_that_cannot_be_traced(config, tmp_path):
    prefixed = {f"inner.{name}" if name != "*" else name: own for name, own in config.items()} if isinstance(config, dict) else config
    model = quantize.prepare(Opaque(trained_norms(network())).eval(), prefixed)
    if not isinstance(config, dict):
        quantize.calibrate(model, [X])
    model = quantize.convert(model)
    quantize.save(model, tmp_path / "f")
    for own in (model, quantize.load(Opaque(network()).eval(), tmp_path / "f")):
        with torch.no_grad():
            for _ in range(2):
                part, whole = own(X)
                assert type(part) is torch.Tensor and part.dtype == torch.float32 and type(whole) is torch.Tensor


def test_an_interrupted_forward_is_forgotten_by_the_next():
    model = packed(CONFIGS[0])

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model[5].register_forward_pre_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(X)
    handle.remove()
    with torch.no_grad():
        model(X)
        assert not region_of(model).is_entered() and type(model[0](X)) is torch.Tensor


def test_ends_with_an_error_and_does_not_reach_other_threads():
    model = packed(CONFIGS[0])
    region = region_of(model)
    with pytest.raises(ValueError, match="input must be"):
        model(torch.randn(2, 5, 12, 12))
    assert not region.is_entered()
    with inside(model):
        found = []
        thread = threading.Thread(target=lambda: found.append(region.is_entered()))
        thread.start()
        thread.join()
        assert region.is_entered() and found == [False]
    assert not region.is_entered()


def test_a_model_that_is_called_in_its_own_forward():
    model, seen = packed(CONFIGS[0]), []
    region = region_of(model)

    def call_again(module, args):
        if not seen:
            seen.append(False)
            model(X)
            seen.append(region.is_entered())

    model[5].register_forward_pre_hook(call_again)
    model(X)
    assert seen == [False, True] and not region.is_entered()
