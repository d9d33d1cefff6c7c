"""The CUDA kernels return the CPU's bits, and a training step on a GPU is the CPU's up to rounding."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize

pytestmark = pytest.mark.gpu
ops = torch.ops.quantize
SHAPES = [(1, 1), (3, 7), (2, 127), (2, 129), (5, 257), (4, 1000), (2, 64, 32, 32), (1, 70000), (300, 3)]
GROUPS = [256, 1, 100, 1000, 0, -1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([11, 12])


def inputs(shape, dtype):
    """Noise, and the same with a constant sample, extremes and poison."""
    x = torch.randn(shape).to(dtype)
    yield x
    y = x.clone()
    y.view(-1)[:: max(1, y.numel() // 3)] = torch.finfo(dtype).max
    yield y
    z = x.clone()
    z[0] = 0.25
    z.view(-1)[-1] = torch.nan
    yield z


def same(a, b):
    """Bit for bit, NaN like NaN."""
    torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_quantize(shape, bits, dtype):
    for x in inputs(shape, dtype):
        for group in GROUPS:
            ours, cpu = ops.group_quantize(x.cuda(), bits, group, SEED), ops.group_quantize(x, bits, group, SEED)
            for a, b in zip(ours, cpu, strict=True):
                same(a, b)
            more = (None, bits, group, list(x.shape), list(x.stride()), dtype, SEED)
            same(ops.group_dequantize(*ours, *more), ops.group_dequantize(*cpu, *more))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_each_sample(dtype):
    x = torch.randn(7, 3, 40, 11).to(dtype)
    bits = torch.tensor([1, 2, 4, 8, 8, 1, 2], dtype=torch.uint8)
    for group in (256, 100, 0):
        ours = ops.group_quantize_mixed(x.cuda(), bits.cuda(), 26, group, SEED)
        cpu = ops.group_quantize_mixed(x, bits, 26, group, SEED)
        used = sum(len(ops.group_quantize(x[:1], b, group, SEED)[0]) for b in bits.tolist())  # what lies behind them nobody has written
        same(ours[0][:used], cpu[0][:used])
        same(ours[1], cpu[1])
        more = (0, group, list(x.shape), list(x.stride()), dtype, SEED)
        same(ops.group_dequantize(*ours, bits.cuda(), *more), ops.group_dequantize(*cpu, bits, *more))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_formats(dtype):
    for order in ((0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2)):
        x = torch.randn(3, 8, 9, 10).to(dtype).permute(order)
        for a, b in zip(ops.group_quantize(x.cuda(), 2, 256, SEED), ops.group_quantize(x, 2, 256, SEED), strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_variance(shape, dtype):
    x = torch.randn(shape).to(dtype)
    # Terms are p(1 - p) in units of squared steps: what float32 sums of them lose is a part of those, however small the sums.
    steps = ((x.max() - x.min()).float() / torch.tensor([1, 3, 15, 255])).square()
    lost = 1e-7 * x[0].numel() * steps if x.numel() else steps
    for group in (256, 100, 0):
        got, want = ops.group_variance(x.cuda(), group).cpu(), ops.group_variance(x, group)
        assert ((got - want).abs() <= 1e-5 * want + lost).all()


@pytest.mark.parametrize("samples", [1, 7, 128, 5000])
def test_allocate_bits(samples):
    variance = torch.rand(samples, 1) * torch.tensor([1.0, 0.1, 0.005, 1e-5])
    for average, most in ((1, 8), (2, 8), (3, 4), (8, 8)):
        budget = min(average, most) * samples
        same(ops.allocate_bits(variance.cuda(), budget, most), ops.allocate_bits(variance, budget, most))


@pytest.mark.parametrize("samples", [0, 1, 7, 128, 5000])
def test_allocation_curve(samples):
    variance = torch.rand(samples, 1) * torch.tensor([1.0, 0.1, 0.005, 1e-5])
    cost, averages = torch.randint(1000, (samples, 4)).float(), [1 + 0.4 * i for i in range(20)]  # whole numbers: the order of sums is free
    for most in (1, 4, 8):
        same(ops.allocation_curve(variance.cuda(), cost.cuda(), averages, most), ops.allocation_curve(variance, cost, averages, most))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 8, 129, 1000, 70001])
def test_masks(n, dtype):
    x = torch.randn(n).to(dtype)
    for low, high, slope in ((0.0, float("nan"), 0.0), (0.0, float("nan"), 0.1), (-0.3, 0.5, 0.0)):
        (y, mask), (y_cpu, mask_cpu) = ops.clip_mask(x.cuda(), low, high, slope), ops.clip_mask(x, low, high, slope)
        same(y, y_cpu)
        same(mask, mask_cpu)
        same(ops.apply_mask(x.cuda(), mask, 1.0, slope), ops.apply_mask(x, mask_cpu, 1.0, slope))
    same(ops.pack_mask((x > 0).cuda()), ops.pack_mask(x > 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["silu", "hardswish", "mish", "gelu", "gelu_tanh"])
def test_smooth_derivative(function, dtype):
    for n in (1, 7, 8, 1000, 70001):
        x = (torch.randn(n) * 4).to(dtype)
        same(ops.smooth_derivative(x.cuda(), function), ops.smooth_derivative(x, function))
        seed, grad = torch.tensor([3, 4]), torch.randn_like(x)
        (codes, ranges), want = ops.smooth_quantize(x.cuda(), function, 2, 64, seed), ops.smooth_quantize(x, function, 2, 64, seed)
        same(codes, want[0])
        same(ranges, want[1])
        same(ops.smooth_backward(grad.cuda(), codes, ranges, None, 2, 64, seed), ops.smooth_backward(grad, *want, None, 2, 64, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_energy(dtype):
    x = torch.randn(5, 3, 17, 19).to(dtype)
    torch.testing.assert_close(ops.sample_energy(x.cuda()).cpu(), ops.sample_energy(x), rtol=1e-5, atol=0)


def test_pool_indices():
    x = torch.randn(2, 3, 17, 19)
    window = ([17, 19], [3, 3], [2, 2], [1, 1], [1, 1])
    indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)[1]
    offsets = ops.pack_pool_indices(indices.cuda(), *window)
    same(offsets, ops.pack_pool_indices(indices, *window))
    same(ops.unpack_pool_indices(offsets, *window), indices)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize("config", [quantize.ActivationConfig(bits=2, max_bits=2), quantize.ActivationConfig()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_step(config, layout):
    plain = network().to(memory_format=layout)
    x, y = torch.randn(16, 3, 32, 32).contiguous(memory_format=layout), torch.randint(10, (16,))
    models = {device: quantize.QModule(copy.deepcopy(plain).to(device), config) for device in ("cpu", "cuda")}
    for _ in range(4):
        for device, model in models.items():
            torch.manual_seed(1)
            model.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            for _ in range(2):  # a GPU's figures come a step late: here they are waited for, so that both models know the same
                model.activation_state()
                torch.cuda.synchronize()
    # The same noise, but activations that differ in their last bits may round to another code here and there.
    for a, b in zip(models["cuda"].parameters(), models["cpu"].parameters(), strict=True):
        assert F.cosine_similarity(a.grad.cpu().flatten(), b.grad.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = quantize.QModule(network().cuda(), quantize.ActivationConfig(bits=8, max_bits=8))
    x, y = torch.randn(16, 3, 32, 32, device="cuda"), torch.randint(10, (16,), device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("use_gradient", [False, True])
def test_nothing_waits_for_the_device(use_gradient):
    model = quantize.QModule(network().cuda(), quantize.ActivationConfig(use_gradient=use_gradient))
    x, y = torch.randn(16, 3, 32, 32, device="cuda"), torch.randint(10, (16,), device="cuda")
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        model.set_sample_indices(torch.arange(16))
        try:
            F.cross_entropy(model(x), y).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gradients_of_samples_arrive():
    config = quantize.ActivationConfig(use_gradient=True)
    plain, x, y = network(), torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    learned = {}
    for device in ("cpu", "cuda"):
        model = quantize.QModule(copy.deepcopy(plain).to(device), config)
        model.set_sample_indices(torch.arange(16))
        torch.manual_seed(1)
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        learned[device] = model.activation_state()
    assert learned["cpu"].keys() == learned["cuda"].keys()
    for name, values in learned["cpu"].items():
        # Sums of squares in another order, of gradients that other kernels computed.
        torch.testing.assert_close(learned["cuda"][name]["sample_weight"], values["sample_weight"], rtol=1e-2, atol=0)


@pytest.mark.skipif("PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="only the caching allocator counts what is allocated")
def test_memory():
    model = quantize.QModule(network().cuda(), quantize.ActivationConfig(bits=2, max_bits=2))
    x = torch.randn(64, 3, 64, 64, device="cuda")
    report = quantize.memory_report(model, x)
    before = torch.cuda.memory_allocated()
    output = model(x)
    grown = torch.cuda.memory_allocated() - before - output.nbytes
    assert grown == pytest.approx(report.saved_bytes, rel=0.1)
