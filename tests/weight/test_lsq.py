"""The learned step of activations against a twin in PyTorch, whose gradients autograd finds; on every ISA."""

import pytest
import torch
from same_bits import assert_isas_agree, needs_isas, patterns

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 7, 15, 16, 17, 129, 257, 2304]
STEP, ZERO = torch.tensor(0.3), torch.tensor(3.0)


def twin(x, step, zero_point, levels, grad_scale):
    """LSQ (arXiv 1902.08153, equations 1 to 3) with a zero point: float32 decides the level, as ours; the rest is float64's."""
    nearest, low, high = (x.float() * (1 / step)).detach(), -zero_point.double(), levels - zero_point.double()
    step = step.double()
    step = step * grad_scale + (step - step * grad_scale).detach()
    v, rounded = x.double() / step, nearest.round().double()
    inside = rounded + (v - v.detach())
    y = torch.where((nearest >= low) & (nearest <= high), inside, rounded.clamp(low, high)) * step
    return y.float().to(x.dtype)


def both(x, step, zero_point, levels, grad, grad_scale=1.0):
    """(y, grad of x, grad of the step) of ours and of the twin."""
    results = []
    for function in (ops.lsq, twin):
        own, s = x.detach().clone().requires_grad_(), step.clone().requires_grad_()
        y = function(own, s, zero_point, levels, grad_scale)
        results.append((y.detach(), *torch.autograd.grad(y, (own, s), grad)))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_as_twin(each_isa, bits, dtype):
    for n in SIZES:
        for zero_point in (0.0, 1.0, 2.0 ** (bits - 1), 2.0**bits - 1):
            x, grad = (torch.randn(n) * 2**bits * 0.2).to(dtype), torch.randn(n).to(dtype)
            ours, want = both(x, STEP, torch.tensor(zero_point), 2**bits - 1, grad, 0.125)
            assert torch.equal(ours[0], want[0]) and torch.equal(ours[1], want[1])
            # Ours is of float32: n slopes, each off to its own side by two roundings of x / step, below 2^bits, and as much again of sums.
            atol = 4 * 2.0**-24 * n**0.5 * 2**bits * 0.125 * float(grad.float().square().mean().sqrt())
            torch.testing.assert_close(ours[2], want[2], rtol=1e-6, atol=atol)


NASTY = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-38, 65504.0, 0.15, 0.45, -0.15, -0.45])


@needs_isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_gives_the_same_bits(dtype):
    x = torch.cat([torch.randn(50_003) * 3, NASTY]).to(dtype)
    grad = torch.randn(x.shape).to(dtype)

    def run():
        found = []
        for levels in (2, 3, 7, 15, 255):
            for step in (0.3, 1e-3, 1e6, 0.0, -1.0, torch.nan):
                arguments = (torch.tensor(step), ZERO, levels)
                y, both = ops.lsq_quantize(x, *arguments), ops.lsq_backward(grad, x, *arguments, 0.1)
                found += [patterns(t) for t in (y, *both)]
        return found

    assert_isas_agree(run)


def test_ties_go_to_even_and_ends_clip(each_isa):
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 12.49, 12.51, 99.0]).repeat(4)  # lanes and the rest
    y = ops.lsq_quantize(x / 2, torch.tensor(0.5), torch.tensor(1.0), 15) * 2
    assert y[:10].tolist() == [-1, -1, 0, 0, 2, 2, 4, 12, 13, 14]
    assert torch.equal(y.view(4, 10), y[:10].expand(4, 10))
    (grad_x, grad_step) = ops.lsq_backward(torch.ones(10), x[:10], torch.tensor(1.0), torch.tensor(1.0), 15, 1.0)
    assert grad_x.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]  # -1.5 rounds to -2, below the grid's end
    slopes = [-1, -1, 0.5, -0.5, 0.5, -0.5, 0.5, 12 - 12.49, 13 - 12.51, 14]
    assert grad_step.item() == pytest.approx(sum(slopes), abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_and_infinity_clips(each_isa, dtype):
    x = NASTY[2:5].repeat(9).to(dtype)  # lanes and the rest
    y = ops.lsq_quantize(x, STEP, ZERO, 15).view(9, 3)
    ends = torch.stack([torch.tensor(torch.nan), 12 * STEP, -3 * STEP]).to(dtype)
    assert torch.equal(y.isnan(), ends.isnan().expand(9, 3))
    assert torch.equal(y[:, 1:], ends[1:].expand(9, 2))
    grad_x, grad_step = ops.lsq_backward(torch.ones(27, dtype=dtype), x, STEP, ZERO, 15, 1.0)
    assert torch.equal(grad_x.isnan(), x.isnan())
    assert not grad_x.nan_to_num().any()
    assert grad_step.isnan()
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    assert ops.lsq_backward(torch.ones_like(infinite), infinite, STEP, ZERO, 15, 1.0)[1] == 12 - 3


@pytest.mark.parametrize("place", [0, 15, 16, 40_000, 50_002])
def test_one_nan_reaches_the_step(each_isa, place):
    x, grad = torch.randn(50_003), torch.randn(50_003)
    x[place], grad[place] = torch.nan, 0  # whatever the loss makes of it
    grad_x, grad_step = ops.lsq_backward(grad, x, STEP, ZERO, 15, 1.0)
    assert grad_step.isnan()
    assert grad_x.isnan().nonzero().tolist() == [[place]]


def test_a_step_that_is_nan_hides_nowhere(each_isa):
    x, step = torch.randn(100), torch.tensor(torch.nan)
    assert ops.lsq_quantize(x, step, ZERO, 15).isnan().all()
    assert all(g.isnan().all() for g in ops.lsq_backward(torch.ones(100), x, step, ZERO, 15, 1.0))


@pytest.mark.parametrize("step", [0.0, -0.5, -torch.inf, 2.0**-126, 2.0**-101])
def test_a_step_that_is_not_positive_stays_finite(each_isa, step):
    x = torch.randn(100)
    s = torch.tensor(step)
    assert torch.equal(ops.lsq_quantize(x, s, ZERO, 15), ops.lsq_quantize(x, torch.tensor(2.0**-100), ZERO, 15))
    assert ops.lsq_quantize(x, s, ZERO, 15).abs().max() <= 12 * 2.0**-100
    grad_x, grad_step = ops.lsq_backward(torch.ones(100), x, s, ZERO, 15, 1.0)
    assert not grad_x.any()
    assert grad_step.item() == float(torch.where(x > 0, 12, -3).sum())  # upward for a loss that wants larger outputs


def test_the_step_s_gradient_is_that_of_a_smooth_surrogate():
    # What is rounded away, in steps, held fixed: y = x + step * residual inside of the grid and step * end outside of it.
    x, grad = torch.randn(4000).double() * 3, torch.randn(4000).double()
    for levels, zero_point in ((3, 0.0), (15, 3.0), (255, 128.0), (14, 7.0)):
        v = (x.float() * (1 / STEP)).double()
        clipped = v.round().clamp(-zero_point, levels - zero_point)
        inside = (v >= -zero_point) & (v <= levels - zero_point)

        def output(step, v=v, clipped=clipped, inside=inside):
            return (grad * torch.where(inside, x + step * (clipped - v), step * clipped)).sum()

        difference = float(output(0.3 + 1e-3) - output(0.3 - 1e-3)) / 2e-3
        got = ops.lsq_backward(grad.float(), x.float(), STEP, torch.tensor(zero_point), levels, 1.0)[1].item()
        assert got == pytest.approx(difference, rel=1e-4, abs=1e-3)
        # Where the grid ends nothing is held fixed, and the gradient is the function's own.
        high = torch.full((300,), 1e3)
        values = [float(ops.lsq_quantize(high, torch.tensor(s), torch.tensor(zero_point), levels).double().sum()) for s in (0.25, 0.5)]
        slope = ops.lsq_backward(torch.ones(300), high, STEP, torch.tensor(zero_point), levels, 1.0)[1].item()
        assert (values[1] - values[0]) / 0.25 == slope


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(33, 5).t(),
    "gaps": lambda: torch.randn(6, 8, 10).transpose(0, 2)[..., ::2],
    "expanded": lambda: torch.randn(5, 1).expand(5, 17),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(each_isa, name):
    x = LAYOUTS[name]()
    grad = torch.randn(x.shape)
    flat = (x.reshape(-1), STEP, ZERO, 15)
    y = ops.lsq_quantize(x, *flat[1:])
    grad_x, grad_step = ops.lsq_backward(grad, x, *flat[1:], 0.5)
    want_x, want_step = ops.lsq_backward(grad.reshape(-1), *flat, 0.5)
    assert torch.equal(y.reshape(-1), ops.lsq_quantize(*flat))
    assert torch.equal(grad_x.reshape(-1), want_x)
    torch.testing.assert_close(grad_step, want_step, rtol=1e-5, atol=1e-5)  # sums in memory order
    if name == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
    if name == "empty":
        assert grad_step.item() == 0


@pytest.mark.parametrize("n", [1, 16384, 16385, 100_003])
def test_threads_do_not_matter(n):
    x, grad = torch.randn(n), torch.randn(n)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((ops.lsq_quantize(x, STEP, ZERO, 15), *ops.lsq_backward(grad, x, STEP, ZERO, 15, 0.1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_gradient_without_the_other():
    x, step = torch.randn(40), STEP.clone().requires_grad_()
    both_x = x.clone().requires_grad_()
    whole = torch.autograd.grad(ops.lsq(both_x, step, ZERO, 15, 0.5).square().sum(), (both_x, step))
    assert torch.equal(torch.autograd.grad(ops.lsq(x, step, ZERO, 15, 0.5).square().sum(), step)[0], whole[1])
    assert torch.equal(torch.autograd.grad(ops.lsq(both_x, STEP, ZERO, 15, 0.5).square().sum(), both_x)[0], whole[0])
    assert not ops.lsq(x, STEP, ZERO, 15, 0.5).requires_grad
