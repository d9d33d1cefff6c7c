"""Ops with bound arguments: the same op, checked when it is bound."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import _C

ops = torch.ops.quantize


def test_is_the_op():
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    assert torch.equal(_C.BoundOp("quantize::power_of_two", (True,))(x), ops.power_of_two(x, True))
    step, zero = torch.tensor(0.1), torch.tensor(3.0)
    assert torch.equal(_C.BoundOp("quantize::lsq", (step, zero, 15, 1.0))(x), ops.lsq(x, step, zero, 15, 1.0))
    leaf = torch.randn(5, requires_grad=True)
    _C.BoundOp("quantize::power_of_two", (False,))(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5))


def test_defaults_and_named_arguments():
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    conv = _C.BoundOp("aten::conv2d", (weight,))
    assert torch.equal(conv(x), F.conv2d(x, weight)) and torch.equal(conv(x, padding=[1, 1]), F.conv2d(x, weight, padding=1))
    assert torch.equal(conv(x), F.conv2d(x, weight))
    with pytest.raises(ValueError, match="BoundOp: arguments must be those of aten::conv2d; got steps"):
        conv(x, steps=1)
    with pytest.raises(ValueError, match="BoundOp: arguments must be those of aten::conv2d; got input"):
        conv(x, input=x)


def test_errors():
    with pytest.raises(ValueError, match="BoundOp: arguments must be the 1 to 1 of quantize::power_of_two behind its first; got 2"):
        _C.BoundOp("quantize::power_of_two", (True, True))
    with pytest.raises(RuntimeError, match="nothing"):
        _C.BoundOp("quantize::nothing", ())
    with pytest.raises((TypeError, RuntimeError), match="cast|Expected"):
        _C.BoundOp("quantize::power_of_two", ("yes",))
    with pytest.raises(ValueError, match="bits must be between 2 and 8"):
        _C.BoundOp("quantize::fake_quantize", ("uniform", 9, False))(torch.ones(2, 2))


def test_watch():
    held = {"a": torch.ones(2), "b": torch.zeros(1)}
    watch = _C.Watch([(held, name, tensor) for name, tensor in held.items()])
    assert watch.unchanged()
    held["b"].add_(1)
    assert not watch.unchanged()
    with torch.inference_mode():  # its tensors count no versions, so that their values are compared
        held["b"] = torch.zeros(1)
        watch = _C.Watch([(held, "b", held["b"])])
        assert watch.unchanged()
        held["b"].add_(1)
        assert not watch.unchanged()
    watch = _C.Watch([(held, "b", held["b"])])
    assert watch.unchanged()
    held["b"] = held["b"].clone()
    assert not watch.unchanged()
    del held["b"]
    assert not watch.unchanged()
    with pytest.raises(ValueError, match="Watch: a must be in its dictionary"):
        _C.Watch([(held, "a", torch.ones(2))])


def test_layers_see_new_buffers():
    model = quantize.prepare(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4)), quantize.XNOR()).eval()
    packed, x = quantize.convert(model), torch.randn(2, 64)
    before = packed(x)
    assert packed[0]._next is None  # nothing says that it may: no batch norm is between them
    with torch.no_grad():
        packed[1].scales.mul_(2)
        packed[1].bias.mul_(2)
    assert torch.equal(packed(x), 2 * before)
    packed[0].scales = -packed[0].scales
    assert not torch.equal(packed(x), 2 * before)


@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.Uniform(4, activation_bits=8)])
def test_replicas_use_their_own_buffers(config):
    """As DataParallel makes them: attributes copied, then other buffers put in."""
    prepared = quantize.prepare(nn.Sequential(nn.Linear(64, 8)), config)
    prepared(torch.randn(4, 64))
    (layer,) = quantize.convert(prepared)
    x = torch.randn(2, 64)
    before = layer(x)
    replica = layer._replicate_for_data_parallel()
    replica._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()}
    with torch.no_grad():
        replica.scales.zero_()
    assert torch.equal(replica(x), replica.bias.expand(2, -1)) and torch.equal(layer(x), before)


def test_usual_calls():
    x = torch.randn(6, 64)
    for config, most in ((quantize.Uniform(8), 4), (quantize.Uniform(8, activation_bits=8), 6), (quantize.XNOR(), 6)):
        prepared = quantize.prepare(nn.Sequential(nn.Linear(64, 8)), config)
        prepared(x)
        (layer,) = quantize.convert(prepared)
        want = layer(x[:1])
        for rows in range(1, 7):
            assert (layer._call(x[:rows]) is not None) == (rows <= most)
        assert torch.equal(layer._call(x[:1]), want) and layer._call(x.double()) is None and layer._call(x[:0]) is None
        assert layer._call(x[:2].clone().requires_grad_()) is None
