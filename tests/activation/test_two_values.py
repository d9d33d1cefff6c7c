"""What is kept of an input of two values is a bit an element, whatever the config says, and exact."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize

BITS = quantize.ActivationConfig(bits=4, max_bits=4)


def net():
    layers = [m for _ in range(3) for m in (nn.BatchNorm2d(16), nn.Hardtanh(), nn.Conv2d(16, 16, 3, padding=1, bias=False))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 5))


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.DoReFa(2, 1)])
@pytest.mark.parametrize("first", ["prepare", "QModule"])
@pytest.mark.parametrize("bits", [BITS, quantize.ActivationConfig()])
def test_one_bit_and_exact(config, first, bits):
    plain = quantize.prepare(net(), {"*": config, "10": None})
    chosen = {"*": None, **dict.fromkeys(("2", "5", "8"), bits)}
    model = copy.deepcopy(plain) if first == "prepare" else copy.deepcopy(net())
    model = quantize.QModule(model, chosen)
    if first == "QModule":
        model = quantize.prepare(model, {"*": config, "10": None})
        model.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16, 8, 8)
    for a, b in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert torch.equal(a, b)
    assert model.layer_bits() == {"2": 1.0, "5": 1.0, "8": 1.0}
    rows = [r for r in quantize.memory_report(model, x).layers if r.name == "2" and r.bits == 1]
    assert sum(r.bytes for r in rows) <= x.numel() // 8 + 64


def test_more_bits_go_by_the_config():
    model = quantize.QModule(quantize.prepare(net(), {"*": quantize.DoReFa(2, 2), "10": None}), {"*": None, "5": BITS})
    gradients(model, torch.randn(4, 16, 8, 8))
    assert model.layer_bits() == {"5": 4.0}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (-2.0, 0.5), (0.0, 1.0), (0.25, 0.5)])
def test_hardtanh_keeps_a_bit(inplace, ends):
    values = torch.tensor([-3.0, -2.0, -1.0, -0.0, 0.0, 0.25, 0.3, 0.5, 1.0, 7.0, torch.inf] * 40)
    results = []
    for model in (nn.Sequential(nn.Hardtanh(*ends, inplace)), quantize.QModule(nn.Sequential(nn.Hardtanh(*ends, inplace)))):
        x = values.clone().requires_grad_()
        y = model(x * 1)
        y.backward(torch.arange(float(len(x))))
        results.append((y, x.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    if not inplace:
        assert quantize.memory_report(model, values.clone().requires_grad_()).saved_bytes <= len(values) // 8 + 8


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ends", [(float("nan"), 0.5), (-0.5, float("nan"))])
def test_hardtanh_with_an_end_that_is_nan_is_pytorch_s(inplace, ends):
    x, results = torch.randn(5, 40), []
    for model in (nn.Sequential(nn.Identity()), quantize.QModule(nn.Sequential(nn.Identity()))):
        model[0].forward = lambda x: F.hardtanh(x, *ends, inplace)
        leaf = x.clone().requires_grad_()
        y = model(leaf * 1)
        y.sum().backward()
        results.append((y.detach().isnan(), leaf.grad))
    assert results[0][0].all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_binary_net_trains_in_an_eighth_of_the_memory():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *net())
    model = quantize.prepare(model, {"*": quantize.XNOR(), "0": None, "11": None})
    report = quantize.memory_report(quantize.QModule(model, quantize.ActivationConfig(bits=2, max_bits=2)), torch.randn(32, 3, 8, 8))
    assert report.ratio > 8
