"""What QModule, its configuration and pools refuse: by name, or as PyTorch does, and before anything has changed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize


def test_a_class_that_cannot_be_subclassed_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def __init_subclass__(cls, *, name, **options):
            super().__init_subclass__(**options)

    model = Net()
    with pytest.raises(TypeError, match="name"):
        quantize.QModule(model)
    assert type(model) is Net and type(model.layer) is nn.Linear


def test_numpys_numbers_become_pythons():
    config = quantize.ActivationConfig(bits=np.float32(2), max_bits=np.int64(8), group_size=np.int32(64))
    assert [type(value) for value in (config.bits, config.max_bits, config.group_size)] == [float, int, int]
    assert config == quantize.ActivationConfig(bits=2, max_bits=8, group_size=64)
    assert type(quantize.ActivationConfig().bits) is int and quantize.ActivationConfig(group_size="tensor").group_size == "tensor"


@pytest.mark.parametrize("convert", [quantize.QModule, quantize.prepare])
def test_a_key_of_none(convert):
    kind = quantize.ActivationConfig if convert is quantize.QModule else quantize.Uniform
    with pytest.raises(TypeError, match="config's keys must be glob patterns over module names; got None"):
        convert(nn.Sequential(nn.Linear(4, 4)), {None: kind()})


def test_gelu_of_an_unknown_approximation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return F.gelu(self.layer(x), approximate="x")

    with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
        quantize.QModule(Net())(torch.randn(4, 64))


@pytest.mark.parametrize("options", [{"stride": 2**62}, {"stride": 2**40}, {"dilation": 2**62}])
def test_pools_of_numbers_beyond_memory(options):
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    with pytest.raises(RuntimeError):
        nn.MaxPool2d(3, padding=1, **options)(x)
    with pytest.raises(RuntimeError):
        quantize.QMaxPool2d(3, padding=1, **options)(x)


def test_float64_into_a_batch_norm_and_another_device():
    with pytest.raises(TypeError, match="^QBatchNorm2d: input must be float32, as the weight is; got float64"):
        quantize.QBatchNorm2d(4)(torch.randn(2, 4, 5, 5).double())
    for layer in (quantize.QLinear(4, 3), quantize.QLinear(4, 3).eval()):
        with pytest.raises(ValueError, match="^QLinear: input must be on cpu, as the weight is; got one on meta"):
            layer(torch.ones(2, 4, device="meta"))


def test_layers_whose_attributes_were_changed():
    layer = quantize.QConv2d(4, 3, 3)
    layer.padding = 1  # as PyTorch takes it
    assert layer(torch.randn(2, 4, 9, 9)).shape == (2, 3, 9, 9)
    with pytest.raises(RuntimeError, match="[Kk]ernel size|non-empty|non-zero"):
        layer(torch.randn(2, 4, 0, 9))
    with pytest.raises(TypeError, match="^QReLU6: input must be a dense Tensor; got a nested one"):
        quantize.QReLU6()(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
