"""Binary layers: exact against float64 on the signs, the same bits on every ISA, layout and number of threads."""

import pytest
import torch
import torch.nn.functional as F
from same_bits import assert_isas_agree
from torch.library import opcheck

from quantize.packed.binary_panels import binary_codes, binary_panels, tap_sums
from quantize.packed.layout import to_rows

ops = torch.ops.quantize

# outputs, inputs, kernel, groups, stride, padding, dilation, height, width
CONVS = [
    (16, 1, (3, 3), 1, (1, 1), (1, 1), (1, 1), 5, 4),
    (17, 3, (3, 3), 1, (1, 1), (1, 1), (1, 1), 11, 13),
    (33, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 31),
    (16, 16, (1, 1), 1, (2, 2), (0, 0), (1, 1), 9, 9),
    (12, 130, (1, 1), 2, (3, 2), (0, 0), (1, 1), 2, 31),
    (8, 17, (3, 3), 1, (2, 2), (1, 1), (1, 1), 8, 7),
    (5, 63, (5, 5), 1, (1, 1), (2, 2), (2, 2), 12, 9),
    (65, 64, (3, 3), 1, (1, 1), (1, 1), (1, 1), 14, 14),
    (19, 65, (3, 3), 1, (1, 2), (2, 0), (1, 2), 7, 12),
    (96, 96, (3, 3), 2, (1, 1), (1, 1), (1, 1), 7, 7),
    (34, 34, (3, 3), 2, (2, 1), (1, 1), (1, 1), 6, 7),
    (17, 17, (3, 3), 17, (1, 1), (1, 1), (1, 1), 6, 5),
    (32, 16, (5, 5), 16, (2, 2), (2, 2), (1, 1), 9, 9),
    (20, 256, (3, 3), 1, (1, 1), (1, 1), (1, 1), 13, 13),
    (7, 96, (1, 5), 1, (1, 2), (0, 2), (1, 1), 1, 40),
    (4, 16, (3, 3), 1, (3, 3), (4, 4), (1, 1), 1, 1),
    (2, 576, (3, 3), 1, (1, 1), (1, 1), (2, 2), 5, 5),
    (64, 128, (3, 3), 2, (2, 1), (1, 1), (1, 2), 9, 70),
    (70, 64, (3, 3), 1, (1, 1), (4, 4), (1, 1), 3, 3),
    (33, 128, (1, 1), 1, (2, 2), (0, 0), (1, 1), 11, 9),
    (40, 32, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 11),
    (96, 96, (3, 5), 3, (2, 1), (1, 2), (1, 1), 8, 9),
    (35, 160, (2, 3), 1, (1, 2), (0, 1), (2, 2), 9, 10),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def signs(*shape):
    return torch.randint(2, shape).float().mul_(2).sub_(1)


def floats(*shape):
    """With both zeros, infinities and NaN."""
    x = torch.randn(shape)
    for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan):
        x[torch.rand(shape) < 0.05] = value
    return x


def thresholds(channels):
    """Batch norm's: infinite where the bit is constant."""
    threshold = torch.randn(channels) * 0.3
    threshold[::5], threshold[1::7] = torch.inf, -torch.inf
    return threshold, torch.randint(2, (channels,), dtype=torch.uint8)


def bits_of(x, threshold=None, flip=None):
    """bool [N, C, ...]."""
    shape = (-1, *[1] * (x.dim() - 2))
    below = x < (0.0 if threshold is None else threshold.view(shape))
    return below if flip is None else below ^ flip.bool().view(shape)


def packed_bits(bits):
    """uint8 [N, ..., 8 * ceil(C / 64)] of bool [N, C, ...]."""
    last = bits.movedim(1, -1)
    return binary_codes(torch.where(last, -1.0, 1.0).flatten(0, -2)).unflatten(0, last.shape[:-1])


def numbers(bits, unit):
    return bits.double() if unit else torch.where(bits, -1.0, 1.0).double()


def weights(weight, groups=1):
    """(codes, panels, sums) of signs [N, C, *kernel]."""
    rows = to_rows(weight)
    codes, channels = binary_codes(rows), weight.shape[1]
    taps = rows.shape[1] // channels
    return codes, binary_panels(codes, rows.shape[1], groups), tap_sums(codes, taps, channels)


def conv(
    x, weight, case, *, threshold=None, flip=None, unit=False, scales=None, bias=None, next_threshold=None, next_flip=None, residual=None
):
    outputs, inputs, kernel, groups, stride, padding, dilation, *_ = case
    scales = torch.ones(outputs) if scales is None else scales
    geometry = [list(pair) for pair in (kernel, stride, padding, dilation)]
    after = (scales, bias, next_threshold, next_flip, inputs, *geometry, groups, residual)
    return ops.packed_binary_conv2d(x, threshold, flip, unit, *weights(weight, groups), *after)


def expected_dot(bits, weight, case, unit):
    """Float64 holds the sums exactly; its padding is zero."""
    _, _, _, groups, stride, padding, dilation, *_ = case
    return F.conv2d(numbers(bits, unit), weight.double(), None, stride, padding, dilation, groups)


def made(case, batch=2):
    outputs, inputs, kernel, groups, *_, height, width = case
    return floats(batch, inputs, height, width), signs(outputs, inputs // groups, *kernel), torch.randn(outputs), torch.randn(outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_conv_is_exact(each_isa, case, unit, layout):
    x, weight, scales, bias = made(case)
    x = x.contiguous(memory_format=layout)
    threshold, flip = thresholds(case[1])
    for t, f in ((None, None), (threshold, None), (threshold, flip), (None, flip)):
        dot = expected_dot(bits_of(x, t, f), weight, case, unit)
        out = conv(x, weight, case, threshold=t, flip=f, unit=unit, scales=scales, bias=bias)
        assert torch.equal(out, dot.float() * scales.view(-1, 1, 1) + bias.view(-1, 1, 1))
        assert out.is_contiguous(memory_format=layout if not x.is_contiguous() else torch.contiguous_format)
    assert torch.equal(conv(x, weight, case, unit=unit), expected_dot(bits_of(x), weight, case, unit).float())


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_conv_from_bits_to_bits(each_isa, case, unit):
    x, weight, scales, bias = made(case)
    bits = bits_of(x)
    dot = expected_dot(bits, weight, case, unit)
    packed = packed_bits(bits)
    out = conv(packed, weight, case, unit=unit, scales=scales, bias=bias)
    assert torch.equal(out, dot.float() * scales.view(-1, 1, 1) + bias.view(-1, 1, 1)) and out.is_contiguous()
    whole = torch.iinfo(torch.int32)
    threshold = torch.randint(-5, 6, (case[0],), dtype=torch.int32)
    threshold[::3], threshold[1::4] = whole.max, whole.min
    flip = torch.randint(2, (case[0],), dtype=torch.uint8)
    for f in (None, flip):
        want = packed_bits(bits_of(dot, threshold.double(), f))
        for source in (x, x.contiguous(memory_format=torch.channels_last), packed):
            assert torch.equal(conv(source, weight, case, unit=unit, next_threshold=threshold, next_flip=f), want)


@pytest.mark.parametrize("case", CONVS)
def test_residual_is_the_sum_afterwards(each_isa, case):
    x, weight, scales, bias = made(case)
    packed, rest = packed_bits(bits_of(x)), {"scales": scales, "bias": bias}
    shortcut = torch.randn_like(conv(packed, weight, case))
    shortcut[0, 0, 0, 0] = torch.nan
    for source in (x, x.contiguous(memory_format=torch.channels_last), packed):
        for layout in LAYOUTS:
            residual = shortcut.contiguous(memory_format=layout)
            out = conv(source, weight, case, residual=residual, **rest)
            assert torch.equal((conv(source, weight, case, **rest) + shortcut).nan_to_num(7.0), out.nan_to_num(7.0))
            assert source is not packed or out.stride() == residual.stride()  # bits have no memory format
    for other in (shortcut[:1], torch.tensor(2.0), shortcut.double(), shortcut.half(), shortcut.int()):  # as torch.add has it
        want = conv(packed, weight, case, **rest) + other
        got = conv(packed, weight, case, residual=other, **rest)
        assert got.dtype == want.dtype and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    with pytest.raises(ValueError, match="residual must be None where bits go out"):
        conv(packed, weight, case, residual=shortcut, next_threshold=torch.zeros(case[0], dtype=torch.int32))


def test_padding_is_zero_not_a_sign(each_isa):
    case = (1, 17, (3, 3), 1, (1, 1), (1, 1), (1, 1), 4, 4)
    out = conv(torch.zeros(1, 17, 4, 4), torch.ones(1, 17, 3, 3), case)[0, 0]
    corner, edge, centre = 4.0 * 17, 6.0 * 17, 9.0 * 17
    assert (corner, edge, centre) == (68, 102, 153)
    row, middle = [corner, edge, edge, corner], [edge, centre, centre, edge]
    assert out.tolist() == [row, middle, middle, row]


def test_zeros_and_nan(each_isa):
    case = (1, 1, (1, 1), 1, (1, 1), (0, 0), (1, 1), 1, 5)
    x = torch.tensor([0.0, -0.0, torch.nan, -1e-45, 1.0]).view(1, 1, 1, 5)
    assert conv(x, torch.ones(1, 1, 1, 1), case).flatten().tolist() == [1, 1, 1, -1, 1]
    flip = torch.ones(1, dtype=torch.uint8)
    assert conv(x, torch.ones(1, 1, 1, 1), case, flip=flip).flatten().tolist() == [-1, -1, -1, 1, -1]


@pytest.mark.parametrize("channels", [4608, 16500])  # what fits into the bytes and blocks of the counters, and more
def test_extremes(each_isa, channels):
    for x_value, w_value in ((1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)):
        weight = torch.full((5, channels), w_value)
        arguments = (False, *weights(weight), torch.ones(5), None, None, None, channels)
        for rows in (1, 40):
            out = ops.packed_binary_linear(torch.full((rows, channels), x_value), None, None, *arguments)
            assert torch.equal(out, torch.full((rows, 5), channels * x_value * w_value))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (1, 257, 33), (1, 64, 16), (2, 31, 17), (1, 1025, 130), (13, 100, 50), (16, 129, 7), (70, 513, 65), (150, 64, 20)],
)
def test_linear_is_exact(each_isa, rows, inputs, outputs, unit):
    x, weight, scales, bias = floats(rows, inputs), signs(outputs, inputs), torch.randn(outputs), torch.randn(outputs)
    made_of, (threshold, flip) = weights(weight), thresholds(inputs)
    next_threshold, next_flip = torch.randint(-3, 4, (outputs,), dtype=torch.int32), torch.randint(2, (outputs,), dtype=torch.uint8)
    for t, f in ((None, None), (threshold, flip)):
        bits = bits_of(x, t, f)
        dot = numbers(bits, unit) @ weight.double().T
        want = dot.float() * scales + bias
        assert torch.equal(ops.packed_binary_linear(x, t, f, unit, *made_of, scales, bias, None, None, inputs), want)
        packed = packed_bits(bits)
        assert torch.equal(ops.packed_binary_linear(packed, None, None, unit, *made_of, scales, bias, None, None, inputs), want)
        want = packed_bits(bits_of(dot, next_threshold.double(), next_flip))
        for source, t2, f2 in ((x, t, f), (packed, None, None)):
            out = ops.packed_binary_linear(source, t2, f2, unit, *made_of, scales, None, next_threshold, next_flip, inputs)
            assert torch.equal(out, want)


def test_other_strides_and_empty_batches(each_isa):
    case = CONVS[2]
    x, weight, scales, bias = made(case, batch=4)
    gaps = x[::2, :, :, :].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(conv(gaps, weight, case), conv(x[::2].contiguous(), weight, case))
    assert conv(x[:0], weight, case).shape == (0, 33, 9, 31)
    none = torch.zeros(33, dtype=torch.int32)
    assert conv(x[:0], weight, case, next_threshold=none).shape == (0, 9, 31, 8)
    out = ops.packed_binary_linear(torch.randn(0, 8), None, None, False, *weights(signs(3, 8)), torch.ones(3), None, None, None, 8)
    assert out.shape == (0, 3)


@pytest.mark.parametrize("case", [CONVS[6], CONVS[8], CONVS[12]])
def test_threads_do_not_matter(each_isa, case):
    x, weight, scales, bias = made(case, batch=3)
    threshold = torch.zeros(case[0], dtype=torch.int32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([conv(x[:n], weight, case, scales=scales, bias=bias) for n in (1, 3)])
        found[-1] += [conv(x, weight, case, next_threshold=threshold)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_scratch_is_kept_but_not_its_contents(each_isa):
    # A large padded call, then small ones in the same thread's scratch.
    for case in (CONVS[6], CONVS[0], CONVS[14], CONVS[6], CONVS[9]):
        x, weight, *_ = made(case)
        assert torch.equal(conv(x, weight, case), expected_dot(bits_of(x), weight, case, False).float())


def samples():
    case = CONVS[1]
    x, weight, scales, bias = made(case)
    threshold, flip = thresholds(case[1])
    geometry = (case[1], *[list(pair) for pair in (case[2], case[4], case[5], case[6])], case[3])
    next_threshold = torch.zeros(case[0], dtype=torch.int32)
    made_of = weights(weight)
    op = ops.packed_binary_conv2d
    yield op, (x, threshold, flip, False, *made_of, scales, bias, None, None, *geometry)
    yield op, (x.contiguous(memory_format=torch.channels_last), None, None, True, *made_of, scales, None, None, None, *geometry)
    yield op, (packed_bits(bits_of(x)), None, None, False, *made_of, scales, None, next_threshold, None, *geometry)
    residual = torch.randn(2, case[0], 11, 13).contiguous(memory_format=torch.channels_last)
    bare = (packed_bits(bits_of(x)), None, None, False, *made_of, scales, None, None, None, *geometry)
    yield op, (*bare, residual)
    yield op, (*bare, residual[:1].double())
    made_of, linear = weights(signs(17, 40)), ops.packed_binary_linear
    x, scales, next_threshold = torch.randn(3, 40), torch.rand(17), torch.zeros(17, dtype=torch.int32)
    yield linear, (x, None, None, False, *made_of, scales, None, None, None, 40)
    yield linear, (packed_bits(x < 0), None, None, True, *made_of, scales, None, next_threshold, None, 40)


def test_opcheck():
    for op, arguments in samples():
        opcheck(op.default, arguments)


def test_meta_kernels_give_the_shapes():
    for op, arguments in samples():
        real, meta = op(*arguments), op(*[a.to("meta") if torch.is_tensor(a) else a for a in arguments])
        assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


BYTE = torch.uint8
ERRORS = [
    (0, torch.randn(2, 3, 11), ValueError, r"x must be \[N, C, H, W\] of 3 channels; got \[2, 3, 11\]"),
    (0, torch.randn(2, 4, 11, 13), ValueError, r"x must be \[N, C, H, W\] of 3 channels; got \[2, 4, 11, 13\]"),
    (0, torch.randn(2, 3, 0, 13), ValueError, "x must be at least as large as the kernel"),
    (0, torch.randn(2, 3, 11, 13).double(), TypeError, "x must be Float, or Byte for bits; got Double"),
    (0, torch.zeros(2, 11, 13, 8, dtype=BYTE), ValueError, "threshold and flip must be None where x is bits"),
    (0, torch.zeros(2, 11, 13, 16, dtype=BYTE), ValueError, r"x must be \[N, H, W, bytes\], 8 bytes for 3 channels; got"),
    (1, torch.zeros(4), ValueError, r"threshold must be contiguous \[3\]; got \[4\]"),
    (1, torch.zeros(3).double(), TypeError, "threshold must be Float; got Double"),
    (2, torch.zeros(3), TypeError, "flip must be Byte; got Float"),
    (4, torch.zeros(17, 16, dtype=BYTE), ValueError, r"codes must be contiguous \[17, 8\]; got \[17, 16\]"),
    (4, torch.zeros(8, 17, dtype=BYTE).t(), ValueError, r"codes must be contiguous \[17, 8\]; got \[17, 8\] with gaps"),
    (5, torch.zeros(1, 5, 6, 4, dtype=BYTE), ValueError, r"panels must be contiguous \[1, 5, 7, 4\]; got \[1, 5, 6, 4\]"),
    (6, torch.zeros(9, 16, dtype=torch.int32), ValueError, r"sums must be contiguous \[9, 17\]; got \[9, 16\]"),
    (6, torch.zeros(9, 17), TypeError, "sums must be Int; got Float"),
    (7, torch.zeros(17).half(), TypeError, "scales must be Float; got Half"),
    (8, torch.zeros(16), ValueError, r"bias must be contiguous \[17\]; got \[16\]"),
    (9, torch.zeros(16, dtype=torch.int32), ValueError, r"next_threshold must be contiguous \[17\]; got \[16\]"),
    (10, torch.zeros(17, dtype=BYTE), ValueError, "next_flip must be None without next_threshold"),
    (11, 0, ValueError, "channels must be positive; got 0"),
    (12, [3], ValueError, "kernel, stride, padding and dilation must be pairs"),
    (13, [0, 1], ValueError, "kernel, stride and dilation must be positive and padding not negative"),
    (14, [-1, 1], ValueError, "kernel, stride and dilation must be positive and padding not negative"),
    (16, 2, ValueError, "groups must divide the channels; got 2 for 3 and 17"),
    (16, 0, ValueError, "groups must divide the channels; got 0 for 3 and 17"),
]


@pytest.mark.parametrize(("place", "value", "error", "message"), ERRORS)
def test_errors(place, value, error, message):
    _, arguments = next(samples())
    changed = [*arguments[:place], value, *arguments[place + 1 :]]
    with pytest.raises(error, match=f"packed_binary_conv2d: {message}"):
        ops.packed_binary_conv2d(*changed)


def test_errors_of_linear():
    made_of = weights(signs(3, 8))
    for x in (torch.randn(8), torch.randn(2, 9), torch.zeros(2, 16, dtype=BYTE)):
        with pytest.raises(ValueError, match="packed_binary_linear: x must be"):
            ops.packed_binary_linear(x, None, None, False, *made_of, torch.ones(3), None, None, None, 8)


def test_codes_of_weights():
    weight = signs(6, 70)
    codes = binary_codes(weight)
    assert codes.shape == (6, 16) and not codes[:, 9:].any()
    assert torch.equal((codes[:, 1] >> 3) & 1, (weight[:, 11] < 0).to(BYTE))
    sums = tap_sums(codes, 7, 10)
    assert torch.equal(sums, weight.view(6, 7, 10).sum(2).t().int())
    panels = binary_panels(codes, 70, 2)
    assert panels.shape == (2, 1, 18, 4) and not panels[:, :, :, 3].any()  # three channels a group, filled up to four
    assert panels[1, 0, 5, 2] >> 4 == sum(int(weight[5, 20 + i] < 0) << i for i in range(4))
    with pytest.raises(ValueError, match=r"codes must be uint8 \[N, 16\]; got uint8 \[6, 8\]"):
        binary_panels(codes[:, :8], 70)


def test_isas_agree_bit_for_bit():
    x, weight, scales, bias = made(CONVS[12])
    assert_isas_agree(lambda: [conv(x, weight, CONVS[12], scales=scales, bias=bias)])
