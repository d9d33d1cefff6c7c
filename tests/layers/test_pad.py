"""Reflecting and replicating pads: exact, and nothing kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exact_levels import assert_same, keeps, levels
from torch import nn

import quantize
from quantize.layers import functional


class Padded(nn.Module):
    def __init__(self, pad, padding, mode, **more):
        super().__init__()
        self.pad, self.padding, self.mode, self.more = pad, padding, mode, more

    def forward(self, x):
        return self.pad(x, self.padding, mode=self.mode, **self.more)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize(("padding", "shape"), [((1, 2), (3, 4, 9)), ((1, 0, 2, 3), (3, 4, 7, 9)), ([0, 1, 2, 0, 1, 1], (2, 3, 4, 5, 6))])
def test_same_as_plain(mode, padding, shape):
    plain, ours = Padded(F.pad, padding, mode), Padded(functional.pad, padding, mode)
    x = levels(*shape)
    assert not keeps(assert_same(ours, plain, x), ours, x)
    assert_same(ours, plain, levels(*shape[1:], unbatched=True))
    assert_same(ours, plain, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    if len(shape) == 4:
        assert_same(ours, plain, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(("mode", "padding"), [("constant", (1, 2)), ("constant", (0, 0, 0, 0, 1, 1)), ("circular", (1, 2, 1, 0))])
def test_other_modes_are_torch_s(mode, padding):
    assert_same(Padded(functional.pad, padding, mode), Padded(F.pad, padding, mode), levels(3, 4, 7, 9))


def test_calls_and_layers_in_a_model():
    x = levels(3, 4, 7, 9)
    for plain in (Padded(F.pad, (1, 2, 3, 1), "reflect"), nn.ReflectionPad2d(2), nn.ReplicationPad2d((1, 2, 3, 4))):
        ours = quantize.QModule(copy.deepcopy(plain))
        assert not keeps(assert_same(ours, plain, x), ours, x)
    constant = quantize.QModule(Padded(F.pad, (0, 0, 0, 0, 1, 1), "constant", value=2.0))
    assert torch.equal(constant(x), F.pad(x, (0, 0, 0, 0, 1, 1), value=2.0))


def test_errors():
    with pytest.raises(ValueError, match="mode must be reflect or replicate"):
        torch.ops.quantize.pad(torch.randn(1, 2, 3), [1, 1], "circular")
    with pytest.raises(ValueError, match="padding must have 2, 4 or 6"):
        torch.ops.quantize.pad(torch.randn(1, 2, 3), [1, 1, 1], "reflect")


def test_pytorch_s_error():
    ours = quantize.QModule(Padded(F.pad, (5, 5), "reflect"))
    with pytest.raises(RuntimeError, match="Padding size should be less than the corresponding input dimension"):
        ours(torch.randn(1, 2, 3, requires_grad=True))
