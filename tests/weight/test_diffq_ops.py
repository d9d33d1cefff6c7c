"""The ops against their twin: values, gradients, many weights at once."""

import math

import pytest
import torch
from diffq_twin import (
    DTYPES,
    GROUPS,
    SEED,
    SHAPES,
    SPANS,
    backward,
    batch,
    bits_of,
    call,
    each,
    extents,
    gradients,
    noise,
    on_grid,
    ops,
    rounded_bits_of,
    sample,
    sizes,
    with_noise,
)
from same_bits import assert_isas_agree, needs_isas, patterns

from quantize.weight.diffq import gaussian_quantiles

ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_noisy(y, w, want, dtype):
    """`want` to the result's rounding, and the noise itself to 1e-6 of it."""
    assert (y.dtype, y.shape) == (dtype, w.shape)
    allowed = want.abs() * ROUNDING[dtype] + (want - w.double()).abs() * 2e-6 + 1e-7 * (dtype == torch.float16)
    assert bool(((y.double() - want).abs() <= allowed).all()), float(((y.double() - want).abs() / allowed).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS)
def test_noise_as_twin(each_isa, span, dtype):
    for shape in SHAPES:
        for group_size in GROUPS if dtype == torch.float32 else [8, 17]:
            size, width = sizes(shape, group_size, span)
            w, logits = sample(shape, group_size, dtype)
            for quantiles in (None, gaussian_quantiles(w.device)) if group_size == 8 else (None,):
                y = call(ops.diffq, w, logits, size, width, 2.0, 15.0, 5, quantiles=quantiles)
                assert_noisy(y, w, with_noise(w, logits, size, width, 2, 15, 5, quantiles=quantiles), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS)
def test_grid_as_twin(each_isa, span, dtype):
    for shape in SHAPES:
        for group_size in GROUPS if dtype == torch.float32 else [8, 17]:
            size, width = sizes(shape, group_size, span)
            w, logits = sample(shape, group_size, dtype)
            for low, high in ((2.0, 15.0), (1.0, 16.0), (2.5, 4.25)):
                want, _ = on_grid(w, logits, size, width, low, high)
                assert torch.equal(call(ops.diffq_on_grid, w, logits, size, width, low, high), want), (shape, group_size, low)


@pytest.mark.parametrize("span", SPANS)
def test_ranges_and_where_they_end(each_isa, span):
    for shape in SHAPES:
        size, width = sizes(shape, 8, span)
        w, logits = sample(shape, 8)
        w = (w * 4).round() / 4  # many are equal: the first counts
        _, (ranges,), (places,), _ = ops.diffq_noise([w], [logits], SEED, [0], [size], [width], [2.0], [15.0], None)
        low, extent = extents(w.flatten(), width)
        assert torch.equal(ranges, torch.stack([low, extent], 1))
        begins = torch.arange(len(low)) * width
        want = [[b + int(row.argmin()), b + int(row.argmax())] for b, row in zip(begins.tolist(), w.flatten().split(width), strict=True)]
        assert places.dtype == torch.int32
        assert places.tolist() == want
        assert torch.equal(ops.diffq_round([w], [logits], [size], [width], [2.0], [15.0])[1][0], ranges)


def test_bits_as_twin(each_isa):
    logits = torch.cat([torch.linspace(-9, 9, 1001), torch.tensor([-1e30, -torch.inf, 1e30, torch.inf, torch.nan])])
    whole = logits.nan_to_num(torch.inf)
    for low, high in ((2.0, 15.0), (1.0, 16.0), (3.0, 3.0), (2.5, 4.25)):
        bits = ops.diffq_group_bits(logits, low, high, False)
        torch.testing.assert_close(bits, bits_of(whole, low, high).float(), rtol=3e-7, atol=0)
        assert float(bits.min()) >= low - 1e-6
        assert float(bits.max()) <= high + 1e-6
        rounded = ops.diffq_group_bits(logits, low, high, True)
        assert torch.equal(rounded, rounded_bits_of(whole, low, high).float())
        assert math.ceil(low) <= float(rounded.min()) <= float(rounded.max()) <= math.floor(high)


@pytest.mark.parametrize("span", SPANS)
def test_bits_that_come_with_the_noise(each_isa, span):
    for shape in (*SHAPES, (700, 27)):  # of the last, tasks end within groups
        for group_size in (*GROUPS, 50_000):
            size, width = sizes(shape, group_size, span)
            w, logits = sample(shape, group_size)
            w.requires_grad_(), logits.requires_grad_()
            arguments = (SEED, [0], [size], [width], [2.5], [14.0], None)
            (y,), bits = ops.diffq([w], [logits[: -(-w.numel() // size)]], *arguments)
            for i, rounded in enumerate((False, True)):
                want = ops.diffq_total_bits([logits[: -(-w.numel() // size)]], [w.numel()], [size], [2.5], [14.0], rounded)
                torch.testing.assert_close(bits[:, i], want, rtol=1e-6, atol=0)
            # Their gradient joins that of the noise, and is there without it.
            grad, grad_bits = torch.randn(shape), torch.tensor([[0.25, 0.5]])
            of_noise = torch.autograd.grad(y, (w, logits), grad, retain_graph=True)
            (of_bits,) = torch.autograd.grad(bits, logits, grad_bits, retain_graph=True)
            torch.testing.assert_close(of_bits, torch.autograd.grad(want, logits, torch.tensor([0.75]))[0], rtol=1e-6, atol=0)
            both = torch.autograd.grad((y, bits), (w, logits), (grad, grad_bits))
            assert torch.equal(both[0], of_noise[0])
            torch.testing.assert_close(both[1], of_noise[1] + of_bits, rtol=1e-5, atol=1e-5)


def test_the_noise_and_its_bits_may_have_a_backward_each():
    w, logits = (own.requires_grad_() for own in sample((3, 30), 8))
    want = torch.autograd.grad([call(ops.diffq, w, logits, 8, 30).sum()], (w, logits))
    for first in (0, 1):
        (y,), bits = ops.diffq([w], [logits], SEED, [0], [8], [30], [2.0], [15.0], None)
        w.grad = logits.grad = None
        for part in (y, bits)[:: 1 - 2 * first]:
            part.sum().backward()
        assert torch.equal(w.grad, want[0])
        slopes = torch.autograd.grad(2 * ops.diffq_total_bits([logits], [90], [8], [2.0], [15.0], False), logits)[0]
        torch.testing.assert_close(logits.grad, want[1] + slopes)


@pytest.mark.parametrize("n", [1, 7, 27, 2049, 40_001])
def test_total_bits_as_twin(each_isa, n):
    for group_size in (*GROUPS, 50_000):
        size = group_size or n
        logits = (torch.randn(-(-n // size)) * 3).requires_grad_()
        for rounded in (False, True):
            total = ops.diffq_total_bits([logits, logits], [n, n], [size, size], [2.0, 1.0], [15.0, 6.0], rounded)
            find = rounded_bits_of if rounded else bits_of
            want = torch.stack([each(find(logits.detach(), *bounds), size, n).sum() for bounds in ((2, 15), (1, 6))])
            torch.testing.assert_close(total, want.float(), rtol=1e-6, atol=0)
            grad = torch.autograd.grad(total, logits, torch.tensor([0.5, 2.0]))[0]
            # Rounding passes the gradient straight through.
            smooth = 0.5 * each(bits_of(logits, 2, 15), size, n).sum() + 2 * each(bits_of(logits, 1, 6), size, n).sum()
            torch.testing.assert_close(grad, torch.autograd.grad(smooth, logits)[0], rtol=2e-5, atol=3e-6 * min(size, n))


def test_whole_bits_give_exact_noise(each_isa):
    w = torch.zeros(16, 128)
    w[:, 0], w[:, 1] = -0.5, 0.5  # ranges of 1
    for bits in range(1, 17):
        y = call(ops.diffq, w, torch.zeros(w.numel() // 8), 8, 128, float(bits), float(bits))
        assert torch.equal(y, w + noise(w.numel(), 0).float().view(w.shape) * (1 / torch.tensor(2.0**bits - 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS)
def test_gradients_as_twin(each_isa, span, dtype):
    for shape in SHAPES:
        for group_size in GROUPS if dtype == torch.float32 else [8, 17]:
            size, width = sizes(shape, group_size, span)
            w, logits = sample(shape, group_size, dtype)
            grad = torch.randn(shape).to(dtype)
            quantiles = gaussian_quantiles(w.device) if group_size == 3 else None
            rest = (size, width, 1.5, 9.0, 3, SEED, quantiles)
            ours = gradients(lambda a, b, rest=rest: call(ops.diffq, a, b, *rest), w, logits, grad)
            want = gradients(lambda a, b, rest=rest: with_noise(a, b, *rest), w.double(), logits.double(), grad.double())
            where = (shape, group_size)
            assert [g.dtype for g in ours] == [dtype, torch.float32]
            # Sums of up to 10,000 products in fp32; a logit far from zero makes the slope small, and 1 - sigmoid with it inexact.
            parts = noise(w.numel(), 3, SEED, quantiles).abs() * grad.double().abs().flatten()
            sums = torch.stack([part.sum() for part in parts.split(size)]) * float(w.double().max() - w.double().min())
            assert bool(((ours[1].double() - want[1]).abs() <= want[1].abs() * 2e-5 + sums * 1e-6).all()), where
            sums = each(torch.stack([part.sum() for part in parts.split(width)]), width, w.numel()).view(shape)
            assert bool(((ours[0].double() - want[0]).abs() <= want[0].abs() * ROUNDING[dtype] + sums * 2e-6).all()), where


def test_the_slope_of_a_logit_far_out(each_isa):
    logits = torch.tensor([-8.0, -4.0, 4.0, 8.0], requires_grad=True)
    (grad,) = torch.autograd.grad(ops.diffq_total_bits([logits], [4], [1], [2.0], [15.0], False).sum(), logits)
    want = 13 * torch.sigmoid(logits.detach().double()) * torch.sigmoid(-logits.detach().double())
    assert float(grad.min()) > 0  # there is a way back
    torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=0)


def test_the_grid_passes_gradients_straight_through(each_isa):
    w, logits = sample((3, 683), 8)
    w.requires_grad_()
    logits.requires_grad_()
    grad = torch.randn(w.shape)
    got = torch.autograd.grad(call(ops.diffq_on_grid, w, logits, 8, 683), (w, logits), grad, allow_unused=True)
    assert torch.equal(got[0], grad)
    assert got[1] is None


def test_weights_that_were_not_used():
    ws, logits = zip(*[sample((3, 30), 8) for _ in range(3)], strict=True)
    ws, logits = [w.requires_grad_() for w in ws], [own.requires_grad_() for own in logits]
    rest = (SEED, [4, 5, 6], [8] * 3, [30] * 3, [2.0] * 3, [15.0] * 3, None)
    every = torch.autograd.grad([y.sum() for y in ops.diffq(ws, logits, *rest)[0]], (*ws, *logits))
    for used in ([1], [0, 2]):
        ys, _ = ops.diffq(ws, logits, *rest)
        some = torch.autograd.grad([ys[i].sum() for i in used], (*ws, *logits), allow_unused=True)
        for i in range(6):
            assert (some[i] is None) == (i % 3 not in used)
            assert some[i] is None or torch.equal(some[i], every[i])


def test_one_gradient_without_the_other():
    w, logits = sample((3, 30), 8)
    whole = gradients(lambda a, b: call(ops.diffq, a, b, 8, 30), w, logits, torch.ones_like(w))
    own = w.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(call(ops.diffq, own, logits, 8, 30).sum(), own)[0], whole[0])
    own = logits.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(call(ops.diffq, w, own, 8, 30).sum(), own)[0], whole[1])
    assert not call(ops.diffq, w, logits, 8, 30).requires_grad


def test_gradients_that_others_hold_are_left_alone():
    # The backward changes its gradients in place where it may.
    w, logits = sample((3, 30), 8)
    w.requires_grad_()
    grad = torch.randn(3, 30)
    mine, seen = grad.clone(), []
    (y, other), _ = ops.diffq([w, w], [logits, logits], SEED, [0, 1], [8, 8], [30, 30], [2.0] * 2, [15.0] * 2, None)
    (want,) = torch.autograd.grad(y, w, mine, retain_graph=True)
    assert torch.equal(mine, grad)
    assert not torch.equal(want, grad)
    y.retain_grad()
    y.register_hook(seen.append)
    (y * grad).sum().backward(retain_graph=True)
    assert torch.equal(w.grad, want)
    assert torch.equal(y.grad, grad)
    assert torch.equal(seen[0], grad)
    first, second = (torch.autograd.grad(t, w, grad, retain_graph=True)[0] for t in (y, other))
    (both,) = torch.autograd.grad(y + other, w, grad, retain_graph=True)  # one tensor is the gradient of both
    torch.testing.assert_close(both, first + second)
    (both,) = torch.autograd.grad((y, y.view(90)), w, (grad, grad.view(90)))
    torch.testing.assert_close(both, torch.autograd.grad(call(ops.diffq, w, logits, 8, 30), w, 2 * grad)[0])


def test_logits_that_changed_before_the_backward_are_an_error():
    w, logits = sample((3, 30), 8)
    logits.requires_grad_()
    y = call(ops.diffq, w, logits, 8, 30)
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_weights_at_once_are_as_each_alone(dtype):
    ws, logits, seed, *lists = batch(dtype)
    made = ops.diffq_noise(ws, logits, seed, *lists, None)
    grads = backward(ws, logits, *made[1:3], seed, *lists, None)
    rounded = ops.diffq_round(ws, logits, *lists[1:])
    for i in range(len(ws)):
        own = [[values[i]] for values in lists]
        alone = ops.diffq_noise([ws[i]], [logits[i]], seed, *own, None)
        for got, want in zip(made, alone, strict=True):
            assert torch.equal(got[i], want[0])
        alone = backward([ws[i]], [logits[i]], alone[1], alone[2], seed, *own, None)
        for got, want in zip(grads, alone, strict=True):
            assert torch.equal(got[i], want[0])
        assert torch.equal(rounded[0][i], ops.diffq_round([ws[i]], [logits[i]], *own[1:])[0][0])


def everything():
    """Patterns of all that the ops return for `batch`, noise of either kind."""
    torch.manual_seed(1)
    results = []
    for dtype in DTYPES:
        ws, logits, seed, *lists = batch(dtype)
        for quantiles in (None, gaussian_quantiles(ws[0].device)):
            made = ops.diffq_noise(ws, logits, seed, *lists, quantiles)
            back = backward([w.flip(0).contiguous() for w in ws], logits, *made[1:3], seed, *lists, quantiles)
            results += [patterns(t) for part in (*made, *back) for t in part]
        results += [patterns(t) for part in ops.diffq_round(ws, logits, *lists[1:]) for t in part]
    numels = [w.numel() for w in ws]
    for rounded in (False, True):
        results.append(patterns(ops.diffq_bits(logits, numels, lists[1], *lists[3:], rounded)))
        results += [patterns(ops.diffq_group_bits(own, 2.0, 15.0, rounded)) for own in logits]
    return results + [patterns(t) for t in ops.diffq_bits_backward(torch.ones(5), logits, numels, lists[1], *lists[3:])]


@needs_isas
def test_every_isa_gives_the_same_bits():
    assert_isas_agree(everything)


NASTY = {
    "constant": lambda: torch.full((4, 33), -1.25),
    "zeros": lambda: torch.zeros(4, 33),
    "signed zeros": lambda: torch.tensor([0.0, -0.0, -0.0]).repeat(4, 11),
    "tiny": lambda: torch.randn(4, 33) * 1e-40,
    "large": lambda: torch.randn(4, 33) * 1e37,
    "NaN": lambda: torch.randn(4, 33).index_fill(1, torch.tensor([32]), torch.nan),
    "infinite": lambda: torch.randn(4, 33).index_fill(0, torch.tensor([2]), -torch.inf),
}


@needs_isas
@pytest.mark.parametrize("name", NASTY)
def test_every_isa_gives_the_same_bits_of_nasty_weights(name):
    w, logits = NASTY[name](), torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 1e30, -70.0, 8.0, -8.0]).repeat(17)[:132]
    grad = torch.randn(w.shape)

    def run():
        found = []
        for size in (1, 8):
            for width in (33, 132, size):
                own = (logits[: -(-132 // size)].contiguous(), size, width)
                made = ops.diffq_noise([w], [own[0]], SEED, [0], [size], [width], [2.0], [15.0], None)
                back = backward([grad], [own[0]], *made[1:3], SEED, [0], [size], [width], [2.0], [15.0], None)
                found += [t for part in (*made, *back) for t in part]
                found.append(call(ops.diffq_on_grid, w, *own))
        return found

    assert_isas_agree(run)


def test_threads_do_not_matter():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(everything())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_noise_is_the_seed_s_and_the_stream_s():
    w, logits = sample((3, 683), 8)
    seeds = [SEED, SEED + torch.tensor([1, 0]), SEED + torch.tensor([0, 1]), SEED + torch.tensor([1 << 32, 0]), -SEED]
    made = [call(ops.diffq, w, logits, 8, 683, stream=stream, seed=seed) for seed in seeds for stream in (0, 1)]
    again = [call(ops.diffq, w, logits, 8, 683, stream=stream, seed=seed) for seed in seeds for stream in (0, 1)]
    for i, y in enumerate(made):
        assert torch.equal(y, again[i])
        assert not any(torch.equal(y, other) for other in made[:i])
    wide = torch.zeros(2049).index_fill(0, torch.tensor([5]), 1.0)
    long, part = (call(ops.diffq, w, torch.zeros(1), len(w), len(w)) for w in (wide, wide[:1000]))
    assert torch.equal(long[:1000], part)  # an element's noise is its place's, whatever follows


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(33, 5).t(),
    "gaps": lambda: torch.randn(6, 8, 10).transpose(0, 2)[..., ::2],
    "expanded": lambda: torch.randn(5, 1).expand(5, 17),
    "scalar": lambda: torch.randn(()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    x = LAYOUTS[name]()
    flat = x.reshape(-1).clone()
    logits, width = torch.randn(-(-len(flat) // 8)), max(1, len(flat) // 5)
    for op in (ops.diffq, ops.diffq_on_grid):
        y = call(op, x, logits, 8, width)
        assert y.shape == x.shape
        assert torch.equal(y.reshape(-1), call(op, flat, logits, 8, width))
    grad = torch.randn(x.shape)
    got = gradients(lambda a, b: call(ops.diffq, a, b, 8, width), x, logits, grad)
    want = gradients(lambda a, b: call(ops.diffq, a, b, 8, width), flat, logits, grad.reshape(-1))
    assert torch.equal(got[0].reshape(-1), want[0])
    assert torch.equal(got[1], want[1])
