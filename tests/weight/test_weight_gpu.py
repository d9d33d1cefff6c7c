"""The weight and packed rooms on a GPU: the CPU's bits, or its numbers where a library multiplies."""

import copy

import pytest
import torch
from same_bits import assert_same_bits
from torch import nn

import quantize

pytestmark = pytest.mark.gpu
ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (16, 16), (65, 151), (64, 3, 3, 3), (33, 257), (512, 2304)]


def nasty(shape, dtype):
    x = torch.randn(shape).mul_(0.1)
    flat = x.view(-1)
    for place, value in enumerate((torch.nan, torch.inf, 0.0, -0.0, 1e-30, 1e30)):
        flat[place * 7 % len(flat)] = value
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook", ["uniform", "po2", "po2plus"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_quantize(shape, codebook, dtype):
    for w in (torch.randn(shape).mul_(0.1).to(dtype), nasty(shape, dtype), torch.zeros(shape, dtype=dtype)):
        for bits in (2, 4, 8):
            for least_squares in (False, True):
                want = ops.channel_quantize(w, codebook, bits, least_squares)
                assert_same_bits(ops.channel_quantize(w.cuda(), codebook, bits, least_squares), want)
                assert_same_bits([ops.clip_gradient(w.cuda(), w.cuda(), want[2].cuda())], [ops.clip_gradient(w, w, want[2])])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_power_of_two(dtype):
    x = torch.cat([torch.randn(10_001) * 2.0 ** torch.randint(-130, 120, (10_001,)), torch.tensor([0.0, 1.5, 0.75, torch.inf, torch.nan])])
    for plus in (False, True):
        assert_same_bits([ops.round_power_of_two(x.to(dtype).cuda(), plus)], [ops.round_power_of_two(x.to(dtype), plus)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 257, 100_003])
def test_lsq(n, dtype):
    x, grad, step, zero_point = (torch.randn(n) * 3).to(dtype), torch.randn(n).to(dtype), torch.tensor(0.3), torch.tensor(3.0)
    for levels in (2, 15, 255):
        arguments = (step, zero_point, levels)
        on_gpu = (step.cuda(), zero_point.cuda(), levels)
        assert_same_bits([ops.lsq_quantize(x.cuda(), *on_gpu)], [ops.lsq_quantize(x, *arguments)])
        got, want = ops.lsq_backward(grad.cuda(), x.cuda(), *on_gpu, 0.1), ops.lsq_backward(grad, x, *arguments, 0.1)
        assert_same_bits(got[:1], want[:1])
        # Up to 100,003 products of at most 255 * 4, added up in fp32 in another order.
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-4, atol=1e-2)
        if n > 6:
            bad = nasty((n,), dtype)
            assert_same_bits([ops.lsq_quantize(bad.cuda(), *on_gpu)], [ops.lsq_quantize(bad, *arguments)])
            got, want = ops.lsq_backward(grad.cuda(), bad.cuda(), *on_gpu, 0.1), ops.lsq_backward(grad, bad, *arguments, 0.1)
            assert_same_bits(got, want)  # the step's is NaN


@pytest.mark.parametrize(
    "config", [quantize.PowerOfTwo(4), quantize.Uniform(4, 8), quantize.Uniform(8, 8), quantize.PowerOfTwo(3, True, 4)]
)
def test_packed_model(config):
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, groups=2))
    model.append(nn.Flatten()).append(nn.Linear(48 * 16, 10))
    x = torch.randn(4, 3, 10, 10)
    quantize.prepare(model, config)
    model(x)
    packed = quantize.convert(model)
    with torch.no_grad():
        want, got = packed(x), copy.deepcopy(packed).cuda()(x.cuda()).cpu()
    tolerance = 1e-3 if config.activation_bits is None else 0.05  # an activation next to a threshold may fall on either side
    assert float((got - want).norm()) <= tolerance * float(want.norm())


@pytest.mark.parametrize("config, hidden", [(quantize.PowerOfTwo(4), True), (quantize.Uniform(4, 8), False)])
def test_training_step(config, hidden):
    """Without layers before it an activation quantizer sees the same bits on both, and no code falls to the other side."""
    model = nn.Sequential(*([nn.Linear(64, 64), nn.ReLU()] if hidden else []), nn.Linear(64, 10))
    quantize.prepare(model, config)
    model(torch.randn(32, 64))
    other, x = copy.deepcopy(model).cuda(), torch.randn(32, 64)
    gradients = []
    for own, inputs in ((model, x), (other, x.cuda())):
        inputs = inputs.detach().requires_grad_()
        gradients.append(torch.autograd.grad(own(inputs).square().mean(), [inputs, *own.parameters()]))
    for want, got in zip(*gradients, strict=True):  # float32 sums of up to 64 products, a step's of 2,048, in another order
        assert want.any() and float((got.cpu() - want).norm()) <= 1e-4 * float(want.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [1, 8, 17, 10**6])
def test_diffq(group_size, dtype):
    shapes = [(3, 7), (64, 3, 3, 3), (33, 257), (1, 2049)] * 8  # more than one launch takes
    weights = [(torch.randn(shape) * 0.1).to(dtype) for shape in shapes]
    weights[0][0, 0] = torch.nan
    groups = [min(group_size, w.numel()) for w in weights]
    logits = [torch.randn(-(-w.numel() // g)) for w, g in zip(weights, groups, strict=True)]
    spans, low, high = [w.numel() // len(w) for w in weights], [2.0] * len(weights), [15.0] * len(weights)
    seed, streams = torch.tensor([5, 6]), list(range(len(weights)))
    quantiles = torch.linspace(-1, 1, 65536)
    for table in (None, quantiles):
        on_gpu = table if table is None else table.cuda()
        device = [[t.cuda() for t in tensors] for tensors in (weights, logits)]
        want = ops.diffq_noise(weights, logits, seed, streams, groups, spans, low, high, table)
        got = ops.diffq_noise(*device, seed, streams, groups, spans, low, high, on_gpu)
        for a, b in zip(got[:3], want[:3], strict=True):
            assert_same_bits(a, b)
        torch.testing.assert_close(got[3].cpu(), want[3], rtol=1e-6, atol=0)
        want = ops.diffq_backward(weights, logits, *want[1:3], seed, streams, groups, spans, low, high, table)
        got = ops.diffq_backward(*device, *got[1:3], seed, streams, groups, spans, low, high, on_gpu)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
    for a, b in zip(
        ops.diffq_round(*device, groups, spans, low, high), ops.diffq_round(weights, logits, groups, spans, low, high), strict=True
    ):
        assert_same_bits(a, b)
    numels = [w.numel() for w in weights]
    for rounded in (False, True):
        arguments = (numels, groups, low, high, rounded)
        torch.testing.assert_close(ops.diffq_bits(device[1], *arguments).cpu(), ops.diffq_bits(logits, *arguments))
    grad = torch.randn(len(weights))
    got, want = (ops.diffq_bits_backward(g, own, numels, groups, low, high) for g, own in ((grad.cuda(), device[1]), (grad, logits)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 257, 100_003])
def test_clipped_noise(n, dtype):
    x, grad, ends, seed = torch.randn(n).to(dtype), torch.randn(n).to(dtype), torch.tensor([-0.5, 0.7, 0.1]), torch.tensor([1, 2])
    assert_same_bits([ops.clipped_noise(x.cuda(), ends.cuda(), seed)], [ops.clipped_noise(x, ends, seed)])
    got, want = ops.clipped_noise_backward(grad.cuda(), x.cuda(), ends.cuda(), seed), ops.clipped_noise_backward(grad, x, ends, seed)
    assert_same_bits(got[:1], want[:1])
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-4, atol=1e-3)


def test_a_step_of_learned_bits():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).cuda()
    quantize.prepare(model, quantize.DiffQ(activation_bits="learned"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = quantize.add_bit_parameters(optimizer, model, lr=1e-2)
    for _ in range(3):
        loss = model(torch.randn(8, 3, 8, 8, device="cuda")).square().mean()
        (loss + 5 * quantize.size_penalty(model) + quantize.activation_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert guard.steps == 3 and guard.skipped == 0
    assert all(p.isfinite().all() for p in model.parameters())
    x = torch.randn(4, 3, 8, 8, device="cuda")
    packed = quantize.convert(model.eval())
    want = model(x).detach()
    assert float((packed(x) - want).norm()) <= 1e-2 * float(want.norm())  # an activation next to a threshold may fall on either side


@pytest.mark.parametrize("config", [quantize.PowerOfTwo(4), quantize.Uniform(8, 8)])
def test_packed_model_under_autocast(config):
    """Whole numbers are multiplied in float32 all the same: half precision ends at 65,504."""
    model = nn.Sequential(nn.Linear(900, 33), nn.ReLU(), nn.Linear(33, 10))
    x = torch.rand(4, 900)
    quantize.prepare(model, config)
    model(x)
    packed = quantize.convert(model).cuda()
    with torch.no_grad():
        want = packed(x.cuda())
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(packed(x.cuda()), want)


def test_arguments_on_other_devices():
    x, one, three, logits, seed = torch.randn(8, 4), torch.ones(1), torch.ones(3), torch.zeros(8), torch.tensor([1, 2])
    groups, bounds = [4, 4], ([2.0, 2.0], [8.0, 8.0])
    for op, arguments in (
        (ops.lsq_backward, (x, x.cuda(), one.cuda(), one.cuda(), 15, 0.1)),
        (ops.binary_backward, (x, x.cuda(), logits.cuda(), logits.cuda(), one.cuda(), 1.0)),
        (ops.dorefa_backward, (x, x.cuda(), three.cuda())),
        (ops.clipped_noise_backward, (x, x.cuda(), three.cuda(), seed)),
        (ops.diffq_bits_backward, (torch.ones(2), [logits.cuda()] * 2, [32, 32], groups, *bounds)),
    ):
        with pytest.raises(ValueError, match="grad must be on cuda:0; got cpu"):
            op(*arguments)
    with pytest.raises(ValueError, match="logits must be on cuda:0; got cpu"):
        ops.diffq_noise([x.cuda(), x], [logits.cuda(), logits], seed, [0, 1], groups, groups, *bounds, None)
    with pytest.raises(ValueError, match="cost must be on cuda:0; got cpu"):
        ops.allocation_curve(x.cuda(), x, [1.0], 8)
