"""Rounding to powers of two: every fp32 exponent, all of fp16 and bf16, against integers; and power_of_two() as a function."""

import math

import pytest
import torch

import quantize

ops = torch.ops.quantize
WORD = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
TOP = {torch.float16: 15, torch.bfloat16: 127, torch.float32: 127, torch.float64: 1023}  # the format's largest exponent
SQRT2, SQRT2_DOUBLE = 0x3504F3, 0x6A09E667F3BCC  # the mantissas of the largest numbers below sqrt(2)
MANTISSAS = [0, 1, SQRT2 - 1, SQRT2, SQRT2 + 1, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF]


def twin(value, plus, top):
    """In integers: |value| = n / 2^j, 2^k <= n < 2^(k+1); up iff log2 n > k + 1/2, PO2+ iff n is nearer to 2^(k+1)."""
    if value == 0 or not math.isfinite(value):
        return value
    n, power = abs(value).as_integer_ratio()
    k = n.bit_length() - 1
    up = 2 * n > 3 * 2**k if plus else n * n > 2 * 4**k
    return math.copysign(math.ldexp(1.0, min(k + up - (power.bit_length() - 1), top)), value)


def assert_as_twin(x, plus):
    got = ops.round_power_of_two(x, plus)
    want = torch.tensor([twin(v, plus, TOP[x.dtype]) for v in x.double().tolist()], dtype=torch.float64).to(x.dtype)
    wrong = (got.view(WORD[x.dtype]) != want.view(WORD[x.dtype])) & ~(got.isnan() & want.isnan() & x.isnan())
    first = int(wrong.int().argmax())
    assert not wrong.any(), f"{x[first].item().hex()} became {got[first].item().hex()}, not {want[first].item().hex()}"


def of_words(words, dtype):
    return torch.tensor(words, dtype=torch.int64).to(WORD[dtype]).view(dtype)


@pytest.mark.parametrize("plus", [False, True], ids=["po2", "po2plus"])
def test_every_exponent_of_fp32(plus):
    normal = [exponent << 23 | m for exponent in range(1, 255) for m in MANTISSAS]
    # What a subnormal's leading bit is followed by, cut to the bits that are left, and its neighbours.
    subnormal = {((1 << 23 | m) >> shift) + d for shift in range(1, 24) for m in MANTISSAS for d in (-1, 0, 1)}
    words = normal + sorted(subnormal & set(range(1 << 23))) + [0, 255 << 23, 255 << 23 | 1, 0x7FC00000]
    assert {word >> 23 for word in words} == set(range(256))
    assert_as_twin(of_words([word | sign for word in words for sign in (0, 1 << 31)], torch.float32), plus)


@pytest.mark.parametrize("plus", [False, True], ids=["po2", "po2plus"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_all_values_of_sixteen_bits(dtype, plus):
    assert_as_twin(of_words(range(65536), dtype), plus)


@pytest.mark.parametrize("plus", [False, True], ids=["po2", "po2plus"])
def test_fp64(plus):
    exponents = [*range(0, 2047, 31), 1, 2, 2045, 2046]
    mantissas = [1, 3, SQRT2_DOUBLE - 1, SQRT2_DOUBLE, SQRT2_DOUBLE + 1, (1 << 51) - 1, 1 << 51, (1 << 51) + 1, (1 << 52) - 1]
    words = [e << 52 | m for e in exponents for m in mantissas] + [e << 52 for e in exponents] + [2047 << 52, 2047 << 52 | 1]
    words += [((1 << 52 | m) >> shift) for shift in range(1, 53) for m in mantissas]  # subnormal
    x = of_words(words, torch.float64)
    assert_as_twin(torch.cat([x, -x]), plus)
    assert_as_twin(torch.randn(3000).double() * torch.randn(3000).double().exp2(), plus)


def test_ties():
    up = torch.nextafter(torch.tensor(1.5), torch.tensor(2.0)).item()
    x = torch.tensor([1.5, up, 0.75, -3.0, 1.4142135, 1.4142137, 3.4e38, -3.4e38, 1e-45, 4.2e-45])
    assert quantize.power_of_two(x, plus=True).tolist()[:6] == [1, 2, 0.5, -2, 1, 1]
    assert quantize.power_of_two(x).tolist()[:6] == [2, 2, 1, -4, 1, 2]
    for plus in (False, True):
        y = quantize.power_of_two(x, plus=plus)
        assert y[6:8].tolist() == [2.0**127, -(2.0**127)]  # the largest there is, never infinity
        assert y[8].item() == 2.0**-149
    assert quantize.power_of_two(x, plus=True)[9].item() == 2.0**-148  # 3 units: a tie
    assert quantize.power_of_two(x)[9].item() == 2.0**-147


def test_zeros_infinities_and_nan_stay():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    for dtype in WORD:
        for plus in (False, True):
            y = quantize.power_of_two(x.to(dtype), plus=plus)
            assert torch.equal(y[:4].view(WORD[dtype]), x[:4].to(dtype).view(WORD[dtype]))
            assert y[4].isnan()


@pytest.mark.parametrize(("plus", "expected"), [(False, 0.0413), (True, 0.0378)])
def test_relative_error_on_normal_numbers(plus, expected):
    # Null: E (q(x) - x)^2 / E x^2 = `expected`, rounded to four places, for x ~ N(0, 1). 2^22 samples; the estimate's deviation is 3e-5, so
    # 2e-4 is 5 of them beside the rounding: false alarms below 1e-5.
    x = torch.randn(2**22)
    error = (quantize.power_of_two(x, plus=plus) - x).double().square()
    squares = x.double().square()
    ratio = float(error.mean() / squares.mean())
    assert float((error - ratio * squares).std()) / 2**11 < 4e-5
    assert ratio == pytest.approx(expected, abs=2e-4)


def test_the_nearest_is_never_worse():
    x = torch.randn(10_000)
    po2, plus = ((quantize.power_of_two(x, plus=p) - x).abs() for p in (False, True))
    assert (plus <= po2).all()
    assert torch.equal(plus, torch.minimum((x.abs() - x.abs().log2().floor().exp2()).abs(), (x.abs() - x.abs().log2().ceil().exp2()).abs()))


LAYOUTS = {
    "contiguous": lambda: torch.randn(5, 7, 3, 3),
    "channels_last": lambda: torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(33, 5).t(),
    "gaps": lambda: torch.randn(6, 8, 10).transpose(0, 2)[..., ::2],
    "expanded": lambda: torch.randn(5, 1).expand(5, 17),
    "vector": lambda: torch.randn(129),
    "strided vector": lambda: torch.randn(258)[::2],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "empty channels": lambda: torch.randn(3, 0),
    "empty vector": lambda: torch.randn(0),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, bits):
    x = LAYOUTS[name]().requires_grad_()
    y = quantize.power_of_two(x, bits, plus=True)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    want = quantize.power_of_two(x.detach().contiguous(), bits, plus=True)
    torch.testing.assert_close(y, want, rtol=1e-6 if bits else 0, atol=0)  # the scale's sums are in memory order
    if name == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(x.shape)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(got[got != 0], grad[got != 0])
    assert (bits is not None) or torch.equal(got, grad)


@pytest.mark.parametrize("plus", [False, True], ids=["po2", "po2plus"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_a_channel(bits, plus):
    x = torch.randn(3, 4000) * torch.tensor([[1.0], [1e-4], [300.0]])
    for row, quantized in zip(x, quantize.power_of_two(x, bits, plus), strict=True):
        top = quantized.abs().max()
        exponents = (quantized[quantized != 0].abs() / top).double().log2()
        assert torch.equal(exponents, exponents.round())
        assert int(exponents.min()) >= -(min(2 ** (bits - 1) - 2, 62))
        assert row.abs().max() / 5 < top < 1.5 * row.abs().max()
        assert torch.equal(quantized, quantize.power_of_two(row, bits, plus))  # a vector has one scale
    assert quantize.power_of_two(torch.tensor(-0.3), bits, plus).item() == pytest.approx(-0.3, rel=1e-6)


def test_gradients():
    x = torch.randn(5, 300, requires_grad=True)
    grad = torch.randn(5, 300)
    assert torch.equal(torch.autograd.grad(quantize.power_of_two(x), x, grad)[0], grad)
    (clipped,) = torch.autograd.grad(quantize.power_of_two(x, 3), x, grad)
    passed = x.abs() <= ops.channel_quantize(x.detach(), "po2", 3, True)[2][:, None]
    assert torch.equal(clipped, torch.where(passed, grad, 0))
    assert not quantize.power_of_two(x.detach()).requires_grad
    assert torch.autograd.grad(quantize.power_of_two(x.half(), plus=True).sum(), x)[0].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0,), TypeError, "x must be a floating-point Tensor of 16, 32 or 64 bits; got float"),
        ((torch.arange(3),), TypeError, "x must be a floating-point Tensor of 16, 32 or 64 bits; got torch.int64"),
        ((torch.ones(3, dtype=torch.complex64),), TypeError, "x must be a floating-point Tensor of 16, 32 or 64 bits; got torch.complex64"),
        ((torch.ones(3), 2.5), TypeError, "bits must be an integer from 2 to 8; got 2.5"),
        ((torch.ones(3), True), TypeError, "bits must be an integer from 2 to 8; got True"),
        ((torch.ones(3), 1), ValueError, "bits must be an integer from 2 to 8; got 1"),
        ((torch.ones(3), 9), ValueError, "bits must be an integer from 2 to 8; got 9"),
        ((torch.ones(3).to_sparse(),), TypeError, "power_of_two: x must be a dense Tensor; got torch.sparse_coo"),
        ((torch.ones(3), 4, 1), TypeError, "plus must be a bool; got 1"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize.power_of_two(*arguments)


def test_levels_of_float64_are_those_of_float32():
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    y = quantize.power_of_two(x, 4)
    assert torch.equal(y, quantize.power_of_two(x.float(), 4).double())
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == torch.float64


def test_threads_do_not_matter():
    x = torch.randn(40_000)
    one = quantize.power_of_two(x)
    torch.set_num_threads(2)
    assert torch.equal(quantize.power_of_two(x), one)
