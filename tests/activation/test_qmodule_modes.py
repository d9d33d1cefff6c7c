"""AMP, memory formats, transforms and processes: a converted model under what PyTorch puts around models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exact_levels import EXACT, levels
from test_qmodule_forward import FIXED, step
from torch import nn

import quantize
from quantize import ActivationConfig, QModule


def network():
    return nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_autocast(dtype, form):
    plain = network().to(memory_format=form)
    ours = QModule(copy.deepcopy(plain), ActivationConfig(bits=8, max_bits=8))
    x = torch.randn(16, 6, 8, 8).to(memory_format=form)
    with torch.autocast("cpu", dtype=dtype):
        (y, grads, saved), (expected, exact, _) = step(ours, x), step(plain, x)
    assert y.dtype == expected.dtype == dtype
    assert torch.equal(y, expected)
    for got, want in zip(grads, exact, strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.98
    assert torch.uint8 in {t.dtype for t in saved}


def test_channels_last_stays():
    model = QModule(network().to(memory_format=torch.channels_last), FIXED)
    formats = []
    for layer in model[:7]:
        layer.register_forward_hook(lambda m, a, y: formats.append(y.is_contiguous(memory_format=torch.channels_last)))
    x = torch.randn(4, 6, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    model(x).sum().backward()
    assert all(formats)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_gradient_scaler():
    model = QModule(network(), FIXED)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(12):  # overflows at first; must come back from it
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(torch.randn(8, 6, 8, 8)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() < 2.0**40


def test_functional_call_and_transforms():
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ours = QModule(copy.deepcopy(plain), FIXED)
    x = torch.randn(4, 8)
    parameters = dict(ours.named_parameters())

    def loss(model):
        return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()

    got, want = torch.func.grad(loss(ours))(parameters, x), torch.func.grad(loss(plain))(dict(plain.named_parameters()), x)
    for key in want:
        torch.testing.assert_close(got[key], want[key])
    per_sample = torch.func.vmap(torch.func.grad(loss(ours)), in_dims=(None, 0))(parameters, x)
    assert per_sample["0.weight"].shape == (4, 8, 8)
    torch.func.functional_call(ours, parameters, (x,)).sum().backward()
    assert ours[0].weight.grad is not None


def test_distributed_data_parallel(process_group):
    plain = nn.Sequential(nn.Linear(40, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    ours = QModule(copy.deepcopy(plain), EXACT)
    parallel = nn.parallel.DistributedDataParallel(ours)
    x = levels(4, 40)
    for model in (parallel, plain):
        model(x).sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, plain[0].weight.grad)
    assert list(parallel.state_dict()) == [f"module.{key}" for key in plain.state_dict()]
    assert ours.layer_bits() == {"0": 8.0, "2": 8.0}
    inside = QModule(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)), EXACT)
    inside(x).sum().backward()
    torch.testing.assert_close(inside.module[0].weight.grad, plain[0].weight.grad)


def test_manual_seed_reproduces_and_forwards_differ():
    model = QModule(network(), FIXED)
    x = torch.randn(8, 6, 8, 8)
    first, again, other = (step(model, x, seed)[1] for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[1], other[1])
    torch.manual_seed(1)
    a, b = (torch.autograd.grad(model(x).sum(), model[0].weight)[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_bad_input_is_named():
    model = QModule(network(), FIXED)
    with pytest.raises(ValueError, match=r"QConv2d '.*': input must be \[N, 6, H, W\] or \[6, H, W\]; got \[2, 5, 8, 8\]"):
        model(torch.randn(2, 5, 8, 8))
    with pytest.raises(TypeError, match="QConv2d '.*': input must be a floating-point Tensor; got int64"):
        model(torch.ones(2, 6, 8, 8, dtype=torch.int64))
    with pytest.raises(TypeError):
        model()
    assert quantize.memory_report(model, torch.randn(2, 6, 8, 8)).saved_bytes > 0
