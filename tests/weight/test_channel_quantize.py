"""Fake quantization by channels against the same search for a scale in plain PyTorch, on every ISA."""

import pytest
import torch
from same_bits import assert_isas_agree, needs_isas, patterns

from quantize import PowerOfTwo, Uniform
from quantize.weight.quantizer import WeightQuantizer

ops = torch.ops.quantize
BOOKS = ["uniform", "po2", "po2plus"]
SIZES = [1, 7, 15, 16, 17, 129, 257, 2304]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def candidates(book, bits, least_squares):
    """Ranges as parts of the largest magnitude, in fp32."""
    if not least_squares:
        return [1.0]
    if book == "uniform":
        return torch.tensor([2 ** (-c / 8) for c in range({2: 17, 3: 17, 4: 9, 5: 6, 6: 6}.get(bits, 3))]).tolist()
    return torch.tensor([2 ** ((1 - c) / 4) for c in range(10)]).tolist()


def levels_of(t, book, bits):
    """The nearest level of t >= 0 in units where the largest is 2^(bits-1) - 1, or 1 for powers of two."""
    if book == "uniform":
        return t.round().clamp(max=2 ** (bits - 1) - 1)
    lowest = 2.0 ** -min(2 ** (bits - 1) - 2, 62)
    mantissa, exponent = torch.frexp(t)  # in [1/2, 1)
    up = mantissa > (0.75 if book == "po2plus" else 0.70710677)
    q = torch.ldexp(torch.ones_like(t), exponent - 1 + up.int()).clamp(lowest, 1.0)
    return torch.where(t <= lowest / 2, 0, q)


def twin(w, book, bits, least_squares):
    """(y, limit) of w [channels, n] in fp32 throughout; a row at a time."""
    anchor = 2.0 ** (bits - 1) - 1 if book == "uniform" else 1.0
    edge = {"uniform": (anchor + 0.5) / anchor, "po2": 2**0.5, "po2plus": 1.5}[book]
    rows, limits = [], []
    for row in w.float():
        high = row.abs().max()
        if high == 0:
            rows.append(torch.zeros_like(row))
            limits.append(torch.tensor(torch.inf))
            continue
        best = None
        for ratio in candidates(book, bits, least_squares):
            q = levels_of(row.abs() * (torch.tensor(anchor) / (high * ratio)), book, bits)
            product, square = (row.abs() / high * q).sum(), (q * q).sum()
            if best is None or product**2 / square > best[0]:
                best = product**2 / square, ratio, q, high * product / square if least_squares else high / anchor
        _, ratio, q, step = best
        rows.append(row.sign() * q * step)
        limits.append(high * ratio * edge if least_squares else torch.tensor(torch.inf))
    return torch.stack(rows), torch.stack(limits)


def weights(channels, n, dtype=torch.float32):
    return (torch.randn(channels, n) * torch.logspace(-3, 3, channels)[:, None]).to(dtype)


@pytest.mark.parametrize("least_squares", [True, False], ids=["least squares", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", BOOKS)
def test_as_twin(each_isa, book, dtype, least_squares):
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]  # the sums' order; the result's rounding
    for n in SIZES:
        for bits in (2, 3, 4, 8):
            w = weights(5, n, dtype)
            y, scale, limit = ops.channel_quantize(w, book, bits, least_squares)
            want, want_limit = twin(w, book, bits, least_squares)
            assert (y.dtype, y.shape, scale.dtype, scale.shape) == (dtype, w.shape, torch.float32, (5,))
            torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=1e-7, msg=lambda m, at=(n, bits): f"n, bits = {at}: {m}")
            torch.testing.assert_close(limit, want_limit, rtol=1e-6, atol=0)


CHANNELS = {
    "noise": lambda: torch.randn(2304),
    "one": lambda: torch.randn(1),
    "negative": lambda: -torch.rand(129),
    "outlier": lambda: torch.cat([torch.randn(256), torch.tensor([1e4])]),
    "halves": lambda: torch.arange(-128, 129) / 2.0,  # ties
    "zeros": lambda: torch.zeros(17),
    "negative zeros": lambda: -torch.zeros(17),
    "one that is not zero": lambda: torch.eye(1, 33)[0] * -3,
    "tiny": lambda: torch.randn(129) * 1e-35,
    "subnormal": lambda: torch.randn(129) * 1e-40,
    "huge": lambda: torch.randn(129).clamp(-3.4, 3.4) * 1e38,
    "NaN": lambda: torch.cat([torch.randn(16), torch.tensor([torch.nan])]),
    "infinite": lambda: torch.cat([torch.tensor([-torch.inf]), torch.randn(16)]),
}


@needs_isas
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", BOOKS)
def test_every_isa_gives_the_same_bits(book, dtype):
    for make in CHANNELS.values():
        w = make().to(dtype)[None]
        grad = torch.randn_like(w)

        def run(w=w, grad=grad):
            made = [ops.channel_quantize(w, book, bits, True) for bits in range(2, 9)]
            return [patterns(t) for parts in made for t in (*parts, ops.clip_gradient(grad, w, parts[2]))]

        assert_isas_agree(run)


@pytest.mark.parametrize("book", BOOKS)
def test_nasty_channels_stay_among_themselves(each_isa, book):
    calm = torch.randn(17)
    alone = ops.channel_quantize(calm[None], book, 4, True)[0][0]
    for name in ("zeros", "negative zeros", "subnormal", "NaN", "infinite", "tiny", "huge"):
        nasty = CHANNELS[name]()[:17]
        y, scale, limit = ops.channel_quantize(torch.stack([calm, nasty, calm]), book, 4, True)
        assert torch.equal(y[0], alone)
        assert torch.equal(y[2], alone)
        if name in ("NaN", "infinite"):
            assert y[1].isnan().all()
            assert scale[1].isnan()
            assert not ops.clip_gradient(torch.ones(3, 17), torch.stack([calm, nasty, calm]), limit)[1].any()
        elif "zero" in name or name == "subnormal":
            assert not y[1].any()
            assert not y[1].signbit().any()
            assert (scale[1].item(), limit[1].item()) == (0.0, torch.inf)
        else:
            high = nasty.abs().max()
            exact = ops.channel_quantize((nasty.double() / high.double()).float()[None], book, 4, True)[0][0].double()
            torch.testing.assert_close(y[1].double() / high.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", BOOKS)
def test_a_constant_channel_is_exact(each_isa, book, dtype):
    for n in SIZES:
        for value in (0.1, -3.3, 1e-5, 7.0):
            w = torch.full((1, n), value).to(dtype)
            for bits in range(2, 9):
                y, _, limit = ops.channel_quantize(w, book, bits, True)
                torch.testing.assert_close(y, w, rtol=3e-6 if dtype == torch.float32 else 0, atol=0)  # the sums' rounding
                assert (w.abs() <= limit).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("book", BOOKS)
def test_a_weight_alone_in_its_channel_trains(book, bits):
    # Any range fits one weight: what was rounded must not choose one that cuts its gradient off.
    w = torch.randn(1000, 1)
    y, _, limit = ops.channel_quantize(w, book, bits, True)
    torch.testing.assert_close(y, w, rtol=5e-7, atol=0)
    assert (w.abs() <= limit[:, None]).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("book", BOOKS)
def test_a_quantized_weight_stays(book, bits):
    config = Uniform(bits) if book == "uniform" else PowerOfTwo(bits, book == "po2plus")
    w = weights(8, 2304)
    once = WeightQuantizer(config)(w)
    torch.testing.assert_close(WeightQuantizer(config)(once), once, rtol=3e-6, atol=0)  # the same levels, the scale to its rounding
    assert torch.equal(WeightQuantizer(config).encode(once)[0], WeightQuantizer(config).encode(w)[0])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("book", BOOKS)
def test_least_squares_is_no_worse_than_the_largest_weight(book, bits):
    for w in (weights(16, 257), weights(16, 9), torch.rand(16, 129), torch.randn(16, 300) ** 3):
        errors = [(ops.channel_quantize(w, book, bits, ls)[0].double() - w.double()).square().sum(1) for ls in (True, False)]
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all()
        y = ops.channel_quantize(w, book, bits, True)[0].double()
        projected = (w.double() * y).sum(1) / y.square().sum(1)
        torch.testing.assert_close(projected, torch.ones(16).double(), rtol=1e-5, atol=0)  # no other scale of these levels is better


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("book", BOOKS)
def test_encode(book, bits):
    for scale in ("least_squares", "max"):
        config = Uniform(bits, scale=scale) if book == "uniform" else PowerOfTwo(bits, book == "po2plus", scale=scale)
        for axis, w in ((0, weights(5, 153)), (1, torch.randn(7, 4, 3, 3))):
            quantizer = WeightQuantizer(config, axis)
            w.select(axis, 1).zero_()
            levels, scales = quantizer.encode(w)
            columns = scales.view(-1, *[1] * (w.dim() - 1))
            assert torch.equal(levels * columns, quantizer(w).movedim(axis, 0))
            assert torch.equal(levels, levels.round())
            assert not levels[1].any()
            size = levels.abs()
            if book == "uniform":
                assert size.max() == 2 ** (bits - 1) - 1
            else:
                assert size.max() == 2.0 ** min(2 ** (bits - 1) - 2, 62)
                assert (torch.frexp(size[size > 0])[0] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", BOOKS)
def test_gradient_stops_beyond_the_limit(each_isa, book, dtype):
    for shape in ((3, 2304), (3, 17), (4, 5, 3, 3)):
        w = torch.randn(shape).pow(3).to(dtype).requires_grad_()
        grad = torch.randn(shape).to(dtype)
        limit = ops.channel_quantize(w.detach(), book, 3, True)[2]
        inside = w.detach().float().abs() <= limit.view(-1, *[1] * (len(shape) - 1))
        (got,) = torch.autograd.grad(ops.fake_quantize(w, book, 3, True), w, grad)
        assert torch.equal(got, torch.where(inside, grad, 0))
        assert inside.float().mean() > 0.5
        assert not inside.all() or w[0].numel() < 100
        assert torch.equal(torch.autograd.grad(ops.fake_quantize(w, book, 3, False), w, grad)[0], grad)  # "max" cuts nothing off


@pytest.mark.parametrize("book", BOOKS)
def test_the_limit_is_where_a_next_level_would_begin(book):
    w = torch.randn(1, 5000)
    levels, scales = WeightQuantizer(Uniform(3) if book == "uniform" else PowerOfTwo(3, book == "po2plus")).encode(w)
    limit = ops.channel_quantize(w, book, 3, True)[2]
    t = w.abs() / (limit / {"uniform": 3.5, "po2": 2**0.5, "po2plus": 1.5}[book])  # the units that were rounded
    top = levels_of(t, book, 3) == (3 if book == "uniform" else 1)
    assert torch.equal(top, levels.abs() == levels.abs().max())
    wider = levels_of(t, "uniform", 8) if book == "uniform" else torch.where(t > 1, levels_of(t / 2, book, 4) * 2, 0)
    beyond = wider > (3 if book == "uniform" else 1)
    assert torch.equal(beyond, w.abs() > limit)


LAYOUTS = {
    "channels_last": lambda: torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last),
    "channels_last, 1x1": lambda: torch.randn(5, 7, 1, 1).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(33, 5).t(),
    "gaps": lambda: torch.randn(6, 8, 10).transpose(0, 2)[..., ::2],
    "expanded": lambda: torch.randn(5, 1).expand(5, 17),
    "vector": lambda: torch.randn(7),
    "scalar": lambda: torch.randn(()),
    "no channels": lambda: torch.randn(0, 3),
    "empty channels": lambda: torch.randn(3, 0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(each_isa, name):
    w = LAYOUTS[name]()
    y, scale, limit = ops.channel_quantize(w, "uniform", 4, True)
    flat = w.reshape(w.shape[0] if w.dim() else 1, -1) if w.numel() else w
    want = ops.channel_quantize(flat, "uniform", 4, True)
    torch.testing.assert_close(y.reshape(flat.shape), want[0], rtol=1e-6, atol=0)  # the sums are in memory order
    torch.testing.assert_close(scale, want[1], rtol=1e-6, atol=0)
    if name.startswith("channels_last"):
        assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(w.shape)
    assert torch.equal(ops.clip_gradient(grad, w, limit).reshape(flat.shape), ops.clip_gradient(grad.reshape(flat.shape), flat, limit))


def test_threads_do_not_matter():
    w = weights(64, 300)
    one = ops.channel_quantize(w, "po2plus", 4, True)
    torch.set_num_threads(2)
    for a, b in zip(one, ops.channel_quantize(w, "po2plus", 4, True), strict=True):
        assert torch.equal(a, b)
