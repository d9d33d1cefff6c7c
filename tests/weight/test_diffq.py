"""What the noise and the grid mean, and what the ops refuse."""

import math

import pytest
import torch
from diffq_twin import SEED, SPANS, batch, call, each, extents, gradients, on_grid, ops, sample, sizes
from torch.library import opcheck

from quantize.weight.diffq import gaussian_quantiles


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


def samples():
    ws, logits, seed, *lists = batch()
    table = gaussian_quantiles(ws[0].device)
    _, ranges, extremes, _ = ops.diffq_noise(ws, logits, seed, *lists, None)
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
    with pytest.raises(RuntimeError, match="diffq: the backward of the bits is not differentiable"):
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
