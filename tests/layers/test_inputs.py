"""Inputs that do not fit are named: the layer, the argument, what was expected and what came. Compressed and packed layers alike."""

import copy
import re

import pytest
import torch
from torch import nn

import quantize

SHAPES = [
    (nn.Conv1d(4, 8, 3), (2, 3, 9), "[N, 4, L] or [4, L]"),
    (nn.Conv2d(4, 8, 3), (2, 3, 9, 9), "[N, 4, H, W] or [4, H, W]"),
    (nn.Conv2d(4, 8, 3), (4,), "[N, 4, H, W] or [4, H, W]"),
    (nn.Conv2d(4, 8, 3), (1, 2, 4, 8, 8), "[N, 4, H, W] or [4, H, W]"),
    (nn.Conv2d(4, 8, 3, groups=2), (2, 2, 9, 9), "[N, 4, H, W] or [4, H, W]"),
    (nn.Conv2d(4, 8, (3, 5), padding=(0, 1), dilation=(2, 1)), (2, 4, 4, 9), "at least 5 x 3 in its last 2 dimensions"),
    (nn.Conv2d(4, 8, 3, padding="valid"), (2, 4, 9, 2), "at least 3 x 3 in its last 2 dimensions"),
    (nn.Conv2d(4, 8, 3, padding="same"), (2, 3, 9, 9), "[N, 4, H, W] or [4, H, W]"),
    (nn.Conv3d(4, 8, 3), (2, 4, 9, 9), "[N, 4, D, H, W] or [4, D, H, W]"),
    (nn.ConvTranspose2d(4, 8, 3), (2, 8, 9, 9), "[N, 4, H, W] or [4, H, W]"),
    (nn.ConvTranspose1d(4, 8, 3), (9,), "[N, 4, L] or [4, L]"),
    (nn.Linear(4, 8), (2, 3), "[*, 4]"),
    (nn.Linear(4, 8), (), "[*, 4]"),
]
NORMS_AND_POOLS = [
    (nn.BatchNorm1d(4), (2, 3), "[N, 4] or [N, 4, L]"),
    (nn.BatchNorm1d(4), (2, 4, 5, 5), "[N, 4] or [N, 4, L]"),
    (nn.BatchNorm2d(4), (2, 4, 5), "[N, 4, H, W]"),
    (nn.BatchNorm2d(4), (2, 3, 5, 5), "[N, 4, H, W]"),
    (nn.BatchNorm3d(4), (2, 4, 5, 5), "[N, 4, D, H, W]"),
    (nn.SyncBatchNorm(4), (2, 3, 5), "[N, 4, *]"),
    (nn.SyncBatchNorm(4), (4,), "[N, 4, *]"),
    (nn.MaxPool2d(2), (6,), "[N, C, H, W] or [C, H, W]"),
    (nn.MaxPool2d(2), (2, 3, 4, 5, 6), "[N, C, H, W] or [C, H, W]"),
    (nn.AvgPool3d(2), (2, 3), "[N, C, D, H, W] or [C, D, H, W]"),
]
INTEGER = [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3), nn.Linear(9, 8), nn.BatchNorm2d(4)]


def compressed(layer: nn.Module, training: bool = True) -> nn.Module:
    """The layer's compressed twin, in a model where its name is "0.inner"."""
    model = quantize.QModule(nn.Sequential(nn.ModuleDict({"inner": copy.deepcopy(layer)}))).train(training)
    return model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("0.inner")))


def fitting(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, 4) if type(layer) is nn.Linear else torch.randn(2, 4, *[9] * len(layer.kernel_size))


def packed(layer: nn.Module, config) -> nn.Module:
    model = quantize.prepare(nn.Sequential(copy.deepcopy(layer)), config)
    model(fitting(layer))  # activation quantizers have seen data
    return quantize.convert(model.eval())[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layer", "shape", "expected"), SHAPES + NORMS_AND_POOLS, ids=str)
def test_compressed_layers_name_wrong_shapes(layer, shape, expected, training):
    ours = compressed(layer, training)
    message = f"Q{type(layer).__name__} '0.inner': input must be {expected}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + ".*; got " + re.escape(str(list(shape))) + "$") as caught:
        ours(torch.randn(shape))
    assert caught.value.__cause__ is not None
    with pytest.raises(ValueError, match=re.escape(message)):
        ours(input=torch.randn(shape))


@pytest.mark.parametrize(
    "config",
    [quantize.Uniform(4), quantize.Uniform(8, activation_bits=8), quantize.XNOR(), quantize.DiffQ()],
    ids=["uniform", "inputs of 8 bits", "xnor", "diffq"],
)
@pytest.mark.parametrize(("layer", "shape", "expected"), SHAPES, ids=str)
def test_packed_layers_name_wrong_shapes(layer, shape, expected, config):
    ours = packed(layer, config)
    for _ in range(2):  # the second call goes a shorter way, where there was a first
        with pytest.raises(ValueError, match=f"^{type(ours).__name__} '0': input must be {re.escape(expected)}.*; got ") as caught:
            ours(torch.randn(shape))
        assert str(caught.value).endswith(f"got {list(shape)}")
        ours(fitting(layer))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", INTEGER, ids=str)
def test_integers_and_what_is_no_tensor_are_named(layer, training):
    ours, kind = compressed(layer, training), type(layer).__name__
    with pytest.raises(TypeError, match=f"^Q{kind} '0.inner': input must be a floating-point Tensor; got int64$"):
        ours(torch.ones(2, 4, 9, 9, dtype=torch.int64))
    for value in (None, [1.0], 3):
        with pytest.raises(TypeError, match=f"^Q{kind} '0.inner': input must be a Tensor; got {type(value).__name__}$"):
            ours(value)


def test_a_layer_by_itself_has_no_name():
    with pytest.raises(ValueError, match=r"^QConv2d: input must be \[N, 4, H, W\] or \[4, H, W\]; got \[2, 3, 9, 9\]$"):
        quantize.QConv2d(4, 8, 3)(torch.randn(2, 3, 9, 9))


def test_a_dtype_other_than_the_weights_is_named():
    layer = quantize.QLinear(4, 8)
    with pytest.raises(TypeError, match="^QLinear: input must be float32, as the weight is; got float64$"):
        layer(torch.randn(2, 4, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # casts all but float64
        assert layer(torch.randn(2, 4, dtype=torch.float16)).shape == (2, 8)
        with pytest.raises(TypeError, match="^QLinear: input must be float32, as the weight is; got float64$"):
            layer(torch.randn(2, 4, dtype=torch.float64))


def test_an_error_of_another_kind_stays_what_it_was():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        quantize.QBatchNorm2d(4)(torch.randn(1, 4, 1, 1))
    with pytest.raises(RuntimeError, match="Padding size should be less than"):
        quantize.QConv2d(4, 8, 3, padding=3, padding_mode="reflect")(torch.randn(2, 4, 2, 2))


def test_the_interceptor_is_back_after_an_error():
    """A functional call after the error, in the same forward, is compressed as before."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x):
            with pytest.raises(ValueError, match="input must be"):
                self.conv(x[:, :3])
            return nn.functional.relu(self.conv(x))

    model, kept = quantize.QModule(Net(), quantize.ActivationConfig(bits=2, max_bits=2)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 4, 9, 9)).sum().backward()
    assert {t.dtype for t in kept if t.numel() >= 2 * 8 * 7 * 7 // 8 and not isinstance(t, nn.Parameter)} == {torch.uint8}


def test_first_layers_of_binary_networks_name_wrong_shapes():
    model = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)).eval()
    model = quantize.convert(quantize.prepare(model, {"0": None, "2": quantize.XNOR()}))
    assert type(model[0]).__name__ == "PackedStemConv2d"
    with pytest.raises(ValueError, match=r"^PackedStemConv2d '0': input must be \[N, 3, H, W\] or \[3, H, W\]; got \[1, 4, 32, 32\]$"):
        model(torch.randn(1, 4, 32, 32))


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (2, 2, 2, 2)), self.weight, self.bias)


class ChannelsFirst(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.movedim(1, -1), self.weight, self.bias)


@pytest.mark.parametrize("layer", [PadsItself(3, 8, 5), ChannelsFirst(3, 8)], ids=["conv", "linear"])
def test_another_forward_takes_what_it_takes(layer):
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(2, 3, 4, 4)
    quantize.prepare(model, quantize.Uniform(4, activation_bits=8))
    assert model(x).shape == layer(x).shape
    assert quantize.calibrate(model, [x])(x).shape == layer(x).shape
    with pytest.raises(TypeError, match="input must be a floating-point Tensor; got int64"):
        quantize.prepare(nn.Sequential(copy.deepcopy(layer)), quantize.Uniform(4, activation_bits=8))(torch.ones(2, 3, 4, 4).long())
    model = nn.Sequential(nn.Linear(3, 8))
    model[0].forward = lambda x: nn.functional.linear(x.movedim(1, -1), model[0].weight, model[0].bias)
    assert quantize.prepare(model, quantize.Uniform(4, activation_bits=8))(x).shape == (2, 4, 4, 8)
