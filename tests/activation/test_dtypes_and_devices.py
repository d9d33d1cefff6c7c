"""QModule where autocast, the default dtype and the device are not the usual ones."""

import copy

import pytest
import torch
from torch import nn

import quantize
from quantize import ActivationConfig, QModule

FIXED = ActivationConfig(bits=2, max_bits=2)


# ------------------------------------------------------------------------------------------------------------------- autocast


class Recurrent(nn.Module):
    """One layer, called ten times under autocast."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(10):
                x = torch.tanh(self.layer(x))
        return x


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(512, 512), (4, 512)), (nn.Conv1d(256, 256, 3, padding=1), (4, 256, 8))], ids=["linear", "conv"]
)
def test_autocast_casts_a_weight_once(layer, shape):
    x = torch.randn(shape)
    plain = Recurrent(copy.deepcopy(layer))
    report = quantize.memory_report(QModule(Recurrent(copy.deepcopy(layer)), FIXED), x)
    assert report.saved_bytes < 1.05 * report.baseline_bytes  # which is little more than the one copy; tanh keeps its output in both
    exact = QModule(copy.deepcopy(plain), ActivationConfig(bits=8, max_bits=8))
    for model in (plain, exact):
        model(x).float().square().mean().backward()
    got, want = exact.layer.weight.grad, plain.layer.weight.grad
    assert (got - want).norm() < 0.05 * want.norm()


def test_autocast_without_its_cache():
    plain = nn.Linear(64, 8)
    ours = QModule(copy.deepcopy(plain), ActivationConfig(bits=8, max_bits=8))
    x = torch.randn(4, 64)
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            first = model(x)
            with torch.no_grad():
                model.weight.mul_(2)
                model.bias.mul_(2)
            assert torch.equal(model(x), 2 * first)  # cast anew


# ------------------------------------------------------------------------------------------------------------------- devices


def test_on_the_meta_device():
    with torch.device("meta"):
        plain, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), torch.randn(8, 3, 8, 8)
    y = QModule(plain, FIXED)(x)
    y.sum().backward()
    assert y.is_meta and y.shape == (8, 4)
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in plain.parameters())


@pytest.fixture
def default_device():
    """Function that makes a device the default until the test ends."""
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.fixture
def default_dtype():
    """Function that makes a dtype the default until the test ends."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def trained(model, x):
    """Three steps of adaptive bits by gradient; the gradients of the last."""
    indices = torch.arange(len(x), device="cpu")
    for step in range(3):
        torch.manual_seed(step)
        model.zero_grad()
        model.set_sample_indices(indices)
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def adaptive():
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    return QModule(nn.Sequential(*layers), ActivationConfig(bits=2, use_gradient=True)), torch.randn(8, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(dtype, default_dtype):
    want = trained(*adaptive())
    model, x = adaptive()
    quantized, y = quantize.prepare(nn.Sequential(nn.Linear(8, 4)), quantize.Uniform(8, activation_bits=8)), torch.randn(4, 8)
    default_dtype(dtype)
    for got, exact in zip(trained(model, x), want, strict=True):
        assert torch.equal(got, exact)
    assert quantized(y).dtype == torch.float32
    quantizers = [make(nn.Sequential(nn.Linear(8, 4).float())) for make in (uniform, learned)]
    assert all(t.dtype == torch.float32 for q in quantizers for t in (q.step, q.zero_point))


def uniform(model):
    return quantize.prepare(model, quantize.Uniform(8, activation_bits=8))[0].activation_quantizer


def learned(model):
    return quantize.prepare(model, quantize.DiffQ(activation_bits="learned"))[0].activation_quantizer


def test_the_default_device_changes_nothing(default_device):
    # The meta device stands for a GPU: a tensor that lands on it by oversight has no values.
    want = trained(*adaptive())
    model, x = adaptive()
    quantizer, y = uniform(nn.Sequential(nn.Linear(8, 4))), torch.randn(4, 8)
    default_device("meta")
    for got, exact in zip(trained(model, x), want, strict=True):
        assert torch.equal(got, exact)
    assert (quantizer(y) - y).abs().max() < 0.1
    assert quantize.pack_activations(x, 8).unpack().device == x.device
    report = quantize.variance_report(model, [(x, x)], lambda output, _: output.square().sum(), draws=1)
    assert report.quantization > 0


def test_adaptive_bits_learn_nothing_where_there_are_no_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def train(model, x):
        for _ in range(3):
            model(x).sum().backward()
        return model

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    model = train(QModule(nn.Sequential(*layers)).to("meta"), torch.randn(4, 3, 8, 8, device="meta"))
    assert all(state.curve is None for state in model._control.states())
    with FakeTensorMode(allow_non_fake_inputs=True):
        train(QModule(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), torch.randn(4, 3, 8, 8))


def test_adaptive_bits_learn_from_subclasses_of_tensors_that_compute():
    class Named(torch.Tensor):
        pass

    model = QModule(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8).as_subclass(Named)).square().sum().backward()
    model._control.begin_step()
    assert all(state.curve is not None for state in model._control.states())
