"""Parts of converted models that are called by themselves: floats, to the bit what the whole model has there."""

import copy
import pickle
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


def test_ends_with_an_error_and_does_not_reach_other_threads():
    model = packed(CONFIGS[0])
    region = region_of(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 12, 12))
    assert not region.is_entered()
    with inside(model):
        with inside(model):  # a model that calls itself
            pass
        found = []
        thread = threading.Thread(target=lambda: found.append(region.is_entered()))
        thread.start()
        thread.join()
        assert region.is_entered() and found == [False]
    assert not region.is_entered()
