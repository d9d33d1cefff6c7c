"""DiffQ's ops against a twin in PyTorch, in double precision and with the same noise; on every ISA."""

import math

import pytest
import torch
from torch.library import opcheck

from quantize import _C
from quantize.weight.diffq import gaussian_quantiles

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([0x123456789ABCDEF, 0x7FEDCBA987654321])
GROUPS = [1, 3, 4, 8, 16, 17, 0]  # 0: the whole tensor
SHAPES = [(1,), (1, 7), (3, 9), (3, 683), (2, 2500)]  # 2,049 and 5,000: two and three pieces of 2,048, the latter with rows across
SPANS = ["channel", "tensor", "group"]
WORD = 0xFFFFFFFF
needs_isas = pytest.mark.skipif(len(_C.supported_isas()) < 2, reason="needs a machine with more than the portable ISA")


# ------------------------------------------------------------------------------------------------------------- the twin


def philox4x32(counter, key, rounds=7):
    """Salmon et al., SC 2011. Four words each of counter and two of key, in int64 tensors or ints."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def noise(n, stream, seed=SEED, quantiles=None):
    """float64 [n]: sixteen counters for 256 elements; element i has half i / 16 % 8 of counter i % 16, from 128 on its bytes exchanged."""
    key, offset = seed.tolist()
    i = torch.arange(n)
    words = philox4x32((i // 256 * 16 + i % 16, torch.full_like(i, stream), offset & WORD, offset >> 32), (key & WORD, key >> 32))
    slot = i % 128 // 16
    u = torch.stack(words)[slot // 2, i] >> (16 * (slot % 2)) & 0xFFFF
    u = torch.where(i % 256 < 128, u, (u << 8 | u >> 8) & 0xFFFF)
    return (u.double() + 0.5) / 65536 - 0.5 if quantiles is None else quantiles.double()[u]


def each(values, size, n):
    """A value for each of n elements of which `size` in a row share one."""
    return values.repeat_interleave(size)[:n]


def extents(flat, span):
    """(low, range) of every `span` elements, [rows]; gradients go to the lowest and the highest, the first of equals."""
    whole = len(flat) // span * span
    ends = []
    for find in (torch.argmin, torch.argmax):
        rows = [part for part in (flat[:whole].view(-1, span), flat[whole:].view(1, -1)) if part.numel()]
        ends.append(torch.cat([row.gather(1, find(row.detach(), 1, keepdim=True))[:, 0] for row in rows]))
    return ends[0], ends[1] - ends[0]


def bits_of(logits, low, high):
    return low + (high - low) * logits.double().sigmoid()


def rounded_bits_of(logits, low, high):
    return bits_of(logits, low, high).round().clamp(math.ceil(low), math.floor(high))


def with_noise(w, logits, group_size, span, low, high, stream=0, seed=SEED, quantiles=None):
    """float64, of w's shape."""
    flat = w.double().flatten()
    n = len(flat)
    scale = 1 / (2 ** bits_of(logits, low, high) - 1)
    y = flat + each(extents(flat, span)[1], span, n) * each(scale, group_size, n) * noise(n, stream, seed, quantiles)
    return y.view(w.shape)


def on_grid(w, logits, group_size, span, low, high):
    """(y, steps) of w's shape in float32 throughout, as the op has it: rounding to a level is decided to the last bit."""
    flat = w.float().flatten()
    n = len(flat)
    base, extent = (each(part, span, n) for part in extents(flat, span))
    most = each(2 ** rounded_bits_of(logits, low, high) - 1, group_size, n).float()
    step = extent / most
    code = torch.where(step > 0, (flat - base) / step, 0).round().clamp(min=torch.zeros(()), max=most)
    return (base + code * step).to(w.dtype).view(w.shape), step.view(w.shape)


def sizes(shape, group_size, span):
    """(group_size, span) in elements."""
    n = math.prod(shape)
    size = group_size or n
    return size, {"channel": n // shape[0], "tensor": n, "group": size}[span]


def sample(shape, group_size, dtype=torch.float32):
    """(w, logits), with logits over all of the bits."""
    n = math.prod(shape)
    w = (torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.1).to(dtype)
    return w, torch.randn(-(-n // (group_size or n))) * 3


def call(op, w, logits, group_size, span, low=2.0, high=15.0, stream=0, seed=SEED, quantiles=None):
    """ops.diffq or ops.diffq_on_grid for one weight."""
    if op is ops.diffq:
        return op([w], [logits], seed, [stream], [group_size], [span], [low], [high], quantiles)[0]
    return op([w], [logits], [group_size], [span], [low], [high])[0]


def backward(grads, *rest):
    """(gradients of the weights, of the logits): the op changes the former in place."""
    changed = [grad.clone() for grad in grads]
    grad_logits = ops.diffq_backward_(changed, *rest)
    kept = [grad.clone() for grad in grads]
    for got, want in zip(ops.diffq_backward(grads, *rest), (changed, grad_logits), strict=True):
        assert all(torch.equal(patterns(a), patterns(b)) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(patterns(a), patterns(b)) for a, b in zip(grads, kept, strict=True))
    return changed, grad_logits


def on_every_isa(function):
    before, results = _C.cpu_isa(), {}
    try:
        for isa in _C.supported_isas():
            _C.set_cpu_isa(isa)
            results[isa] = function()
    finally:
        _C.set_cpu_isa(before)
    return results


def patterns(t):
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16) if t.is_floating_point() else t


# ------------------------------------------------------------------------------------------------------------- values


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
        _, (ranges,), (places,) = ops.diffq_noise([w], [logits], SEED, [0], [size], [width], [2.0], [15.0], None)
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


# ------------------------------------------------------------------------------------------------------------- gradients


def gradients(function, w, logits, grad):
    w, logits = w.detach().clone().requires_grad_(), logits.detach().clone().requires_grad_()
    return torch.autograd.grad(function(w, logits), (w, logits), grad)


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
    every = torch.autograd.grad([y.sum() for y in ops.diffq(ws, logits, *rest)], (*ws, *logits))
    for used in ([1], [0, 2]):
        ys = ops.diffq(ws, logits, *rest)
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
    y, other = ops.diffq([w, w], [logits, logits], SEED, [0, 1], [8, 8], [30, 30], [2.0] * 2, [15.0] * 2, None)
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


# ------------------------------------------------------------------------------------------------------------- many at once


def batch(dtype=torch.float32):
    """Arguments of ops.diffq for weights of several shapes, groups, spans and bounds."""
    shapes, groups = [(3, 9), (2, 5000), (1,), (40, 7), (5, 4100)], [8, 16, 1, 3, 0]
    spans = ["channel", "tensor", "group", "group", "channel"]
    pairs = [sample(shape, size, dtype) for shape, size in zip(shapes, groups, strict=True)]
    both = [sizes(*each_of) for each_of in zip(shapes, groups, spans, strict=True)]
    low, high = [2.0, 1.0, 2.5, 3.0, 2.0], [15.0, 16.0, 4.5, 3.0, 8.0]
    return [w for w, _ in pairs], [own for _, own in pairs], SEED, [3, 1, 4, 1, 5], [a for a, _ in both], [b for _, b in both], low, high


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_weights_at_once_are_as_each_alone(dtype):
    ws, logits, seed, *lists = batch(dtype)
    made = ops.diffq_noise(ws, logits, seed, *lists, None)
    grads = backward(ws, logits, *made[1:], seed, *lists, None)
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
            back = backward([w.flip(0).contiguous() for w in ws], logits, *made[1:], seed, *lists, quantiles)
            results += [patterns(t) for part in (*made, *back) for t in part]
        results += [patterns(t) for part in ops.diffq_round(ws, logits, *lists[1:]) for t in part]
    numels = [w.numel() for w in ws]
    for rounded in (False, True):
        results.append(patterns(ops.diffq_bits(logits, numels, lists[1], *lists[3:], rounded)))
        results += [patterns(ops.diffq_group_bits(own, 2.0, 15.0, rounded)) for own in logits]
    return results + [patterns(t) for t in ops.diffq_bits_backward(torch.ones(5), logits, numels, lists[1], *lists[3:])]


@needs_isas
def test_every_isa_gives_the_same_bits():
    results = on_every_isa(everything)
    for isa, got in results.items():
        assert all(torch.equal(a, b) for a, b in zip(got, results["portable"], strict=True)), isa


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
                back = backward([grad], [own[0]], *made[1:], SEED, [0], [size], [width], [2.0], [15.0], None)
                found += [t.nan_to_num(12345.0) for part in (*made, *back) for t in part]
                found.append(call(ops.diffq_on_grid, w, *own).nan_to_num(12345.0))
        return found

    results = on_every_isa(run)
    for isa, got in results.items():
        assert all(torch.equal(a, b) for a, b in zip(got, results["portable"], strict=True)), isa


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


# ------------------------------------------------------------------------------------------------------------- what it means


def test_noise_has_the_deviation_of_rounding(each_isa):
    # 2^18 weights: a deviation is known to 0.2 %. Two bits: the ends of the range stay put when they are rounded.
    w = torch.rand(64, 4096)
    for bits in (2, 3, 4, 6, 8):
        logits, rest = torch.zeros(w.numel() // 8), (8, 4096, float(bits), float(bits))
        error = call(ops.diffq_on_grid, w, logits, *rest) - w
        step = 1 / (2**bits - 1)
        for quantiles, low, high in ((None, 0.9, 1.1), (gaussian_quantiles(w.device), 1.65, 1.8)):
            added = call(ops.diffq, w, logits, *rest, quantiles=quantiles) - w
            assert low < float(added.std() / error.std()) < high
            assert abs(float(added.mean())) < 5 * step / 2 / 512  # five deviations of the mean at most
            if quantiles is None:
                assert float(added.abs().max()) <= step / 2 * 1.0001
                assert float(added.std()) == pytest.approx(step / 12**0.5, rel=0.01)
            else:
                assert float(added.std()) == pytest.approx(step / 2, rel=0.01)


def test_noise_is_even_and_without_memory(each_isa):
    # Chi-squared of 64 bins and correlations at lags where the drawing repeats itself. False alarms: 6 deviations, below 1e-8.
    w = torch.zeros(512, 512)
    w[:, 0] = 1.0
    added = call(ops.diffq, w, torch.zeros(1), w.numel(), 512, 1.0, 1.0).flatten() - w.flatten()
    added = added.view(512, 512)[:, 1:].flatten()
    counts = torch.histc(added, 64, -0.5, 0.5)
    expected = len(added) / 64
    assert float((counts - expected).square().sum() / expected) < 63 + 6 * (2 * 63) ** 0.5
    for lag in (1, 2, 8, 15, 16, 17, 32, 127, 128, 129, 256, 2048):
        correlation = float((added[lag:] * added[:-lag]).mean() * 12)
        assert abs(correlation) < 6 / len(added) ** 0.5, lag


def test_gaussian_quantiles():
    table = gaussian_quantiles(torch.device("cpu"))
    assert table.dtype == torch.float32
    assert torch.equal(table, -table.flip(0))
    assert bool((table.diff() >= 0).all())
    assert float(table.std()) == pytest.approx(0.5, rel=1e-3)
    assert float(torch.erf(table[-1].double() * 2 / 2**0.5)) == pytest.approx(1 - 1 / 65536, rel=1e-6)


@pytest.mark.parametrize("op", [ops.diffq, ops.diffq_on_grid], ids=["noise", "grid"])
def test_an_outlier_harms_its_own_channel_only(op):
    w, logits = torch.randn(6, 40), torch.randn(30)
    wide = w.clone()
    wide[2, 7] = 100 * w.abs().max()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(call(op, wide, logits, 8, 40)[others], call(op, w, logits, 8, 40)[others])
    changed = (call(op, wide, logits, 8, 240)[others] != call(op, w, logits, 8, 240)[others]).float().mean()
    assert changed > 0.9  # one range for the whole tensor, as in the paper


@pytest.mark.parametrize("span", SPANS)
def test_the_grid(each_isa, span):
    for bits in (1, 2, 3, 5, 8, 16):
        for group_size in (8, 17, 0):
            size, width = sizes((5, 64), group_size, span)
            w, _ = sample((5, 64), group_size)
            logits = torch.zeros(-(-320 // size))
            y = call(ops.diffq_on_grid, w, logits, size, width, float(bits), float(bits))
            _, step = on_grid(w, logits, size, width, bits, bits)
            low, extent = extents(w.flatten(), width)
            rounding = each(low.abs() + extent, width, 320).view(5, 64) * 2e-7
            assert bool(((y - w).abs() <= step * 0.5 + rounding).all())
            codes = (y.flatten() - each(low, width, 320)) / step.flatten()
            assert float((codes - codes.round()).abs().max()) < 0.01 if bits < 16 else 0.1
            for own in y.flatten().split(width):
                assert own.unique().numel() <= 2**bits
            # The lower end of a range is a level to the last bit, the upper one to its rounding.
            got = extents(y.flatten(), width)
            assert torch.equal(got[0], low)
            torch.testing.assert_close(got[0] + got[1], low + extent, rtol=1e-6, atol=1e-6 * float(w.abs().max()))
            again = call(ops.diffq_on_grid, y, logits, size, width, float(bits), float(bits))
            torch.testing.assert_close(again, y, rtol=1e-6, atol=1e-6 * float(w.abs().max()))


def test_bounds_that_are_not_whole(each_isa):
    w, logits = torch.randn(4, 64), torch.linspace(-9, 9, 32)
    y = call(ops.diffq_on_grid, w, logits, 8, 64, 2.5, 4.5)
    least, most = (call(ops.diffq_on_grid, w, logits, 8, 64, b, b) for b in (3.0, 4.0))
    assert torch.equal(y.view(32, 8)[:10], least.view(32, 8)[:10])
    assert torch.equal(y.view(32, 8)[-10:], most.view(32, 8)[-10:])
    assert torch.equal(call(ops.diffq_on_grid, w, logits, 8, 64, 3.2, 4.9), most)  # the one whole number within


@pytest.mark.parametrize("value", [0.0, -0.0, 1.25, -3.0])
def test_constant_weights_stay_and_get_finite_gradients(each_isa, value):
    for width in (33, 8, 132):
        w, logits = torch.full((4, 33), value), torch.randn(17)
        grad = torch.randn(4, 33)
        assert torch.equal(call(ops.diffq, w, logits, 8, width), w)
        assert torch.equal(call(ops.diffq_on_grid, w, logits, 8, width), w)
        got = gradients(lambda a, b, width=width: call(ops.diffq, a, b, 8, width), w, logits, grad)
        torch.testing.assert_close(got[0], grad, rtol=0, atol=1e-4)  # the range's two gradients meet in one element
        assert not got[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", [ops.diffq, ops.diffq_on_grid], ids=["noise", "grid"])
def test_what_is_not_finite_stays_in_its_channel(each_isa, op, bad):
    for n in (1, 7, 33, 300, 5000):
        for place in {0, n // 2, n - 1}:
            w, logits = torch.randn(4, n), torch.randn(-(-4 * n // 8))
            want = call(op, w, logits, 8, n)
            w[1, place] = bad
            y = call(op, w, logits, 8, n)
            assert torch.equal(y[[0, 2, 3]], want[[0, 2, 3]])
            assert not y[1].isfinite().any()


def test_a_weight_that_is_nan_shows_in_the_gradient_of_its_logits():
    w, logits = torch.randn(4, 40), torch.randn(20)
    w[1, 3] = torch.nan
    _, grad = gradients(lambda a, b: call(ops.diffq, a, b, 8, 40), w, logits, torch.ones(4, 40))
    assert grad.isnan().nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("value", [0.0, 8.0, -8.0, 100.0, torch.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_logit(each_isa, bad, value):
    w, logits, grad = torch.randn(4, 40), torch.full((20,), value), torch.ones(4, 40)
    w[3] = 1.0  # a range of zero
    for row in (2, 3):
        spoilt = grad.clone()
        spoilt[row, 9] = bad
        _, got = gradients(lambda a, b: call(ops.diffq, a, b, 8, 40), w, logits, spoilt)
        assert (~got.isfinite()).nonzero().flatten().tolist() == [5 * row + 1]


def test_a_logit_that_is_nan_counts_as_max_bits(each_isa):
    w, logits = torch.randn(4, 40), torch.zeros(20)
    logits[7] = torch.nan
    top = logits.nan_to_num(torch.inf)
    for op in (ops.diffq, ops.diffq_on_grid):
        assert torch.equal(call(op, w, logits, 8, 40), call(op, w, top, 8, 40))
    _, grad = gradients(lambda a, b: call(ops.diffq, a, b, 8, 40), w, logits, torch.ones(4, 40))
    assert grad[7] == 0
    assert grad.isfinite().all()
    logits.requires_grad_()
    for rounded in (False, True):
        total = ops.diffq_total_bits([logits], [160], [8], [2.0], [15.0], rounded)
        assert torch.equal(total, ops.diffq_total_bits([top], [160], [8], [2.0], [15.0], rounded))
        (grad,) = torch.autograd.grad(total.sum(), logits)
        assert grad.isfinite().all()
        assert (grad == 0).nonzero().flatten().tolist() == [7]


# ------------------------------------------------------------------------------------------------------------- the ops' contracts


def samples():
    ws, logits, seed, *lists = batch()
    table = gaussian_quantiles(ws[0].device)
    _, ranges, extremes = ops.diffq_noise(ws, logits, seed, *lists, None)
    numels = [w.numel() for w in ws]
    half = [w.half() for w in ws]
    return {
        "diffq_noise": [(ws, logits, seed, *lists, None), (half, logits, seed, *lists, table)],
        "diffq_backward": [(own, logits, ranges, extremes, seed, *lists, kind) for own, kind in ((ws, None), (half, table))],
        "diffq_backward_": [(own, logits, ranges, extremes, seed, *lists, kind) for own, kind in ((ws, None), (half, table))],
        "diffq_round": [(ws, logits, *lists[1:]), (half, logits, *lists[1:])],
        "diffq_group_bits": [(logits[0], 2.0, 15.0, False), (logits[0], 2.0, 15.0, True)],
        "diffq_bits": [(logits, numels, lists[1], *lists[3:], False), (logits, numels, lists[1], *lists[3:], True)],
        "diffq_bits_backward": [(torch.ones(5), logits, numels, lists[1], *lists[3:])],
    }


OPS = ["diffq_noise", "diffq_backward", "diffq_backward_", "diffq_round", "diffq_group_bits", "diffq_bits", "diffq_bits_backward"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    for arguments in samples()[op]:
        # PyTorch traces no op that changes a list and returns another; compiled code calls diffq_backward.
        traced = () if op == "diffq_backward_" else ("test_aot_dispatch_dynamic",)
        opcheck(getattr(ops, op).default, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *traced))


def elsewhere(argument):
    if isinstance(argument, (list, tuple)):
        return [elsewhere(item) for item in argument]
    return torch.empty_like(argument, device="meta") if torch.is_tensor(argument) and argument is not SEED else argument


def flattened(result):
    return [result] if torch.is_tensor(result) else [t for part in result for t in flattened(part)]


@pytest.mark.parametrize("op", OPS)
def test_meta_kernel_gives_the_shapes(op):
    for arguments in samples()[op]:
        real, meta = (flattened(getattr(ops, op)(*own)) for own in (arguments, elsewhere(arguments)))
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in meta]


def test_opcheck_of_the_differentiable():
    ws, logits, seed, *lists = batch()
    ws, logits = [w.requires_grad_() for w in ws], [own.requires_grad_() for own in logits]
    opcheck(ops.diffq.default, (ws, logits, seed, *lists, None))
    opcheck(ops.diffq.default, (ws[:2], logits[:2], seed, *[own[:2] for own in lists], gaussian_quantiles(ws[0].device)))
    opcheck(ops.diffq_on_grid.default, (ws, logits, *lists[1:]))
    opcheck(ops.diffq_total_bits.default, (logits, [w.numel() for w in ws], lists[1], *lists[3:], False))


def test_compiles():
    w, logits = sample((3, 683), 8)

    def function(w, logits):
        total = ops.diffq_total_bits([logits], [2049], [8], [2.0], [15.0], True)
        return call(ops.diffq, w, logits, 8, 683).square().sum() + call(ops.diffq_on_grid, w, logits, 8, 683).sum() + total.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = (gradients(f, w, logits, torch.ones(())) for f in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_second_derivatives():
    w, logits = sample((3, 9), 8)
    w.requires_grad_()
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="diffq: the backward of a quantized weight is not differentiable"):
        torch.autograd.grad(call(ops.diffq, w, logits, 8, 9).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="diffq_total_bits: the backward is not differentiable"):
        total = ops.diffq_total_bits([logits], [27], [8], [2.0], [15.0], False)
        torch.autograd.grad(total.square().sum(), logits, create_graph=True)


def replaced(op, **changes):
    """Arguments of `op` for one weight of 16 elements, some of them changed."""
    w, logits = torch.linspace(-1, 1, 16), torch.zeros(2)
    ranges, extremes = torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int32)
    arguments = {
        "weights": [w],
        "grads": [w],
        "logits": [logits],
        "ranges": [ranges],
        "extremes": [extremes],
        "seed": SEED,
        "streams": [0],
        "numels": [16],
        "group_sizes": [8],
        "spans": [4],
        "min_bits": [2.0],
        "max_bits": [15.0],
        "quantiles": None,
        "rounded": True,
        "grad": torch.ones(1),
    } | changes
    if op == "diffq_group_bits":
        arguments |= {"logits": logits, "min_bits": 2.0, "max_bits": 15.0} | changes
    return [arguments[argument.name] for argument in getattr(ops, op).default._schema.arguments]


WRONG = [
    ("weights", [torch.ones(16).double()], TypeError, "weights must be float32, float16 or bfloat16; got Double"),
    ("weights", [torch.ones(16).int()], TypeError, "weights must be float32, float16 or bfloat16; got Int"),
    ("weights", [torch.ones(0)], ValueError, r"weights must have 1 to 2\^31 - 2 elements each; got \[0\]"),
    ("logits", [torch.zeros(2).double()], TypeError, "logits must be Float; got Double"),
    ("logits", [torch.zeros(3)], ValueError, r"logits must have 2 elements; got \[3\]"),
    ("logits", [torch.zeros(4)[::2]], ValueError, r"logits must be contiguous; got strides \[2\]"),
    ("logits", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("group_sizes", [0], ValueError, "group_sizes and spans must be at least 1; got 0"),
    ("group_sizes", [-8], ValueError, "group_sizes and spans must be at least 1; got -8"),
    ("group_sizes", [8, 8], ValueError, "lists must have an entry for each of the 1 weights; got 2"),
    ("spans", [0], ValueError, "group_sizes and spans must be at least 1; got 8 and 0"),
    ("spans", [-4], ValueError, "group_sizes and spans must be at least 1; got 8 and -4"),
    ("spans", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("streams", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("min_bits", [0.5], ValueError, "must be 1 <= min_bits <= max_bits <= 16; got 0.5 and 15"),
    ("min_bits", [math.nan], ValueError, "must be 1 <= min_bits <= max_bits <= 16; got nan and 15"),
    ("min_bits", [2.0, 2.0], ValueError, "lists must have an entry for each of the 1 weights; got 2"),
    ("max_bits", [16.5], ValueError, "must be 1 <= min_bits <= max_bits <= 16; got 2 and 16.5"),
    ("max_bits", [1.5], ValueError, "must be 1 <= min_bits <= max_bits <= 16; got 2 and 1.5"),
    ("max_bits", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("seed", torch.tensor([1]), ValueError, r"seed must be an int64 CPU tensor \(seed, offset\); got Long \[1\]"),
    ("seed", torch.tensor([1.0, 2.0]), ValueError, "seed must be an int64 CPU tensor"),
    ("quantiles", torch.zeros(3), ValueError, r"quantiles must have 65536 elements; got \[3\]"),
    ("quantiles", torch.zeros(65536).double(), TypeError, "quantiles must be Float; got Double"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_errors(name, value, error, message):
    for op in ("diffq_noise", "diffq_round", "diffq", "diffq_on_grid"):
        if name not in [argument.name for argument in getattr(ops, op).default._schema.arguments]:
            continue
        with pytest.raises(error, match=message):
            getattr(ops, op)(*replaced(op, **{name: value}))


OTHER = [
    ("diffq_backward_", "grads", [torch.ones(16).double()], TypeError, "must be float32, float16 or bfloat16; got Double"),
    ("diffq_backward_", "spans", [0], ValueError, "group_sizes and spans must be at least 1; got 8 and 0"),
    ("diffq_backward_", "ranges", [torch.ones(3, 2)], ValueError, r"ranges must have 8 elements; got \[3, 2\]"),
    ("diffq_backward_", "ranges", [torch.ones(4, 2)] * 2, ValueError, "must have an entry for each of the 1 weights; got 2 and 1"),
    ("diffq_backward_", "extremes", [torch.zeros(3, 2).int()], ValueError, r"extremes must have 8 elements; got \[3, 2\]"),
    ("diffq_backward_", "extremes", [], ValueError, "ranges and extremes must have an entry for each of the 1 weights; got 1 and 0"),
    ("diffq_backward_", "extremes", [torch.zeros(4, 2)], TypeError, "extremes must be Int; got Float"),
    ("diffq_backward_", "extremes", [torch.full((4, 2), 16).int()], ValueError, "extremes must be places in the weight, 0 to 15; got 16"),
    ("diffq_backward_", "extremes", [torch.full((4, 2), -1).int()], ValueError, "extremes must be places in the weight, 0 to 15; got -1"),
    ("diffq_backward_", "extremes", [torch.zeros(2, 4).int().t()], ValueError, "grads and extremes must be contiguous"),
    ("diffq_backward_", "grads", [torch.ones(32)[::2]], ValueError, "grads and extremes must be contiguous"),
    ("diffq_group_bits", "logits", torch.zeros(2).double(), TypeError, "diffq_group_bits: logits must be Float; got Double"),
    ("diffq_group_bits", "min_bits", 0.0, ValueError, "must be 1 <= min_bits <= max_bits <= 16; got 0 and 15"),
    ("diffq_bits", "logits", [torch.zeros(2).double()], TypeError, "diffq_bits: logits must be Float; got Double"),
    ("diffq_bits", "logits", [torch.zeros(3)], ValueError, r"diffq_bits: logits must have 2 elements; got \[3\]"),
    ("diffq_bits", "group_sizes", [0], ValueError, "must be at least 1; got 0"),
    ("diffq_bits", "max_bits", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("diffq_bits_backward", "grad", torch.ones(2), ValueError, r"grad must have 1 elements; got \[2\]"),
    ("diffq_bits_backward", "grad", torch.ones(1).double(), TypeError, "grad must be Float; got Double"),
    ("diffq_bits_backward", "group_sizes", [0], ValueError, "must be at least 1; got 0"),
    ("diffq_bits_backward", "group_sizes", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("diffq_bits_backward", "logits", [], ValueError, "lists must have an entry for each of the 1 weights; got 0"),
    ("diffq_bits_backward", "max_bits", [17.0], ValueError, "must be 1 <= min_bits <= max_bits <= 16; got 2 and 17"),
]


OTHER += [("diffq_backward", *rest) for op, *rest in OTHER if op == "diffq_backward_" and "contiguous" not in rest[-1]]


@pytest.mark.parametrize(("op", "name", "value", "error", "message"), OTHER)
def test_errors_of_the_others(op, name, value, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, op)(*replaced(op, **{name: value}))
