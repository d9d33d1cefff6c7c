"""The integer kernels: exact against float64, the same bits on every ISA and any number of threads."""

import pytest
import torch
import torch.nn.functional as F
from same_bits import assert_isas_agree
from torch.library import opcheck

from quantize.packed.layout import levels_table, pack, storage_bits, to_rows
from quantize.packed.panels import integers, panels, sums

ops = torch.ops.quantize

# method, bits, activation bits
FORMATS = [
    ("uniform", 2, 8),
    ("uniform", 3, 4),
    ("uniform", 4, 8),
    ("uniform", 8, 8),
    ("uniform", 8, 2),
    ("power_of_two", 2, 8),
    ("power_of_two", 3, 8),
    ("power_of_two", 4, 8),
]
# outputs, inputs, kernel, groups, stride, padding, dilation, height, width
CONVS = [
    (16, 3, (3, 3), 1, (1, 1), (1, 1), (1, 1), 11, 13),
    (1, 1, (3, 3), 1, (1, 1), (1, 1), (1, 1), 5, 4),
    (16, 5, (3, 3), 1, (2, 2), (1, 1), (1, 1), 6, 71),
    (16, 15, (1, 1), 1, (1, 1), (0, 0), (1, 1), 3, 40),
    (32, 24, (3, 3), 2, (1, 1), (1, 1), (1, 1), 5, 6),
    (17, 16, (1, 1), 1, (2, 2), (0, 0), (1, 1), 9, 9),
    (65, 63, (5, 5), 1, (1, 1), (2, 2), (2, 2), 12, 9),
    (96, 96, (3, 3), 3, (2, 1), (1, 0), (1, 1), 8, 7),
    (33, 17, (1, 5), 1, (1, 2), (0, 2), (1, 1), 3, 31),
    (32, 65, (3, 3), 1, (1, 1), (1, 1), (1, 1), 4, 6),
    (64, 64, (3, 3), 2, (1, 1), (1, 1), (1, 2), 10, 10),
    (8, 16, (3, 3), 1, (3, 3), (4, 4), (1, 1), 1, 1),
]


def encoded(weight, method, bits):
    """(codes, levels as whole numbers, scales, table of levels, width) of a weight."""
    quantized, scales, _ = ops.channel_quantize(weight, {"uniform": "uniform", "power_of_two": "po2plus"}[method], bits, True)
    levels = (quantized / scales.view(-1, *[1] * (weight.dim() - 1))).round()
    width = storage_bits(bits)
    return pack(to_rows(levels), method, bits), levels, scales, levels_table(method, width), width


def conv_arguments(case, method, bits, activation_bits, layout=torch.contiguous_format, batch=2):
    outputs, inputs, kernel, groups, stride, padding, dilation, height, width = case
    weight = torch.randn(outputs, inputs // groups, *kernel)
    codes, levels, scales, table, storage = encoded(weight, method, bits)
    k = weight[0].numel()
    x = torch.randn(batch, inputs, height, width).contiguous(memory_format=layout)
    step, zero_point = torch.tensor(6.0 / 2**activation_bits), torch.tensor(float(2 ** (activation_bits - 1) - 1))
    made, total = panels(codes, storage, kernel[0] * kernel[1], inputs // groups, groups), sums(integers(codes, method, bits, k), k)
    arguments = (x, step, zero_point, activation_bits, codes, made, table, scales, total, torch.randn(outputs), storage)
    return (*arguments, list(kernel), list(stride), list(padding), list(dilation), groups), levels


def expected_conv(arguments, levels):
    """In float64: whole numbers are multiplied exactly, and the epilogue is float32's."""
    x, step, zero_point, activation_bits, *_, total, bias, _, _, stride, padding, dilation, groups = arguments
    scales = arguments[7]
    whole = (ops.lsq_quantize(x, step, zero_point, 2**activation_bits - 1).double() / step.double()).round()
    sums_exact = F.conv2d(whole, levels.double(), None, stride, padding, dilation, groups)
    return sums_exact.float() * (step * scales).view(-1, 1, 1) + bias.view(-1, 1, 1)


# 3x3 steps of one, which some ISAs take four outputs at a time (csrc/packed/winograd.h): odd sizes, few and many tiles, filled channels.
FILTERS = [
    (16, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 4, 3),
    (17, 19, (3, 3), 1, (1, 1), (0, 0), (1, 1), 9, 8),
    (40, 64, (3, 3), 2, (1, 1), (1, 1), (1, 1), 7, 7),
    (96, 66, (3, 3), 3, (1, 1), (2, 1), (1, 1), 5, 13),
    (16, 32, (3, 3), 1, (1, 1), (3, 0), (1, 1), 1, 64),
    (33, 130, (3, 3), 1, (1, 1), (1, 1), (1, 1), 14, 14),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("method", "bits", "activation_bits"), [("uniform", 8, 8), ("uniform", 8, 2), ("power_of_two", 4, 8)])
def test_filters_are_exact(each_isa, method, bits, activation_bits, layout):
    for case in FILTERS:
        arguments, levels = conv_arguments(case, method, bits, activation_bits, layout)
        assert torch.equal(ops.packed_conv2d(*arguments), expected_conv(arguments, levels)), case


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_filters_of_batches_and_threads(each_isa, batch):
    for case in ((16, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 60, 70), (64, 64, (3, 3), 2, (1, 1), (1, 1), (1, 1), 10, 9)):
        arguments, levels = conv_arguments(case, "uniform", 8, 8, batch=batch)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                assert torch.equal(ops.packed_conv2d(*arguments), expected_conv(arguments, levels))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [1840, 1844])
def test_filters_of_many_channels_do_not_overflow(each_isa, channels):
    levels = torch.full((8, channels, 3, 3), -127.0)
    codes, k = pack(to_rows(levels), "uniform", 8), 9 * channels
    made, total = panels(codes, 8, 9, channels, 1), sums(integers(codes, "uniform", 8, k), k)
    x, one = torch.full((1, channels, 4, 4), 255.0), torch.tensor(1.0)
    table = levels_table("uniform", 8)
    out = ops.packed_conv2d(
        x, one, torch.tensor(0.0), 8, codes, made, table, torch.ones(8), total, None, 8, [3, 3], [1, 1], [0, 0], [1, 1], 1
    )
    assert (out == float(-127 * 255 * k)).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("method", "bits", "activation_bits"), FORMATS)
def test_conv_is_exact(each_isa, method, bits, activation_bits, layout):
    for case in CONVS:
        arguments, levels = conv_arguments(case, method, bits, activation_bits, layout)
        out = ops.packed_conv2d(*arguments)
        assert torch.equal(out, expected_conv(arguments, levels)), case
        assert arguments[0].is_contiguous() or out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("method", "bits", "activation_bits"), FORMATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 257, 33), (1, 64, 16), (2, 31, 17), (13, 100, 50), (25, 129, 65)])
def test_linear_is_exact(each_isa, method, bits, activation_bits, rows, inputs, outputs):
    codes, levels, scales, table, width = encoded(torch.randn(outputs, inputs), method, bits)
    x, bias, step = torch.randn(rows, inputs), torch.randn(outputs), torch.tensor(6.0 / 2**activation_bits)
    zero_point = torch.tensor(1.0)
    made, total = panels(codes, width, 1, inputs, 1), sums(integers(codes, method, bits, inputs), inputs)
    out = ops.packed_linear(x, step, zero_point, activation_bits, codes, made, table, scales, total, bias, width)
    whole = (ops.lsq_quantize(x, step, zero_point, 2**activation_bits - 1).double() / step.double()).round()
    assert torch.equal(out, (whole @ levels.double().T).float() * (step * scales) + bias)


@pytest.mark.parametrize(("method", "bits", "_"), FORMATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 257, 33), (3, 100, 50)])
def test_linear_of_floats(method, bits, _, rows, inputs, outputs):
    codes, levels, scales, table, width = encoded(torch.randn(outputs, inputs), method, bits)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    made = panels(codes, width, 1, inputs, 1)
    (found,) = assert_isas_agree(lambda: [ops.packed_linear_float(x, codes, made, table, scales, bias, width)])
    want = (x.double() @ levels.double().T) * scales.double() + bias.double()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_nan_counts_as_the_lower_end(each_isa):
    arguments, _ = conv_arguments(CONVS[3], "uniform", 4, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.where(torch.rand(arguments[0].shape) < 0.1, torch.nan, arguments[0]).contiguous(memory_format=layout)
        assert torch.equal(ops.packed_conv2d(x, *arguments[1:]), ops.packed_conv2d(x.nan_to_num(-torch.inf), *arguments[1:]))


def test_extremes_do_not_saturate(each_isa):
    # 255 times +-127 in pairs overflows int16, and 4,608 of them fill 28 bits of an int32.
    inputs = 4608
    levels = torch.full((16, inputs), 127.0)
    levels[1::2] = -127.0
    codes, table = pack(levels, "uniform", 8), levels_table("uniform", 8)
    x, one, zero = torch.full((13, inputs), 1e9), torch.tensor(1.0), torch.tensor(0.0)
    for rows in (1, 13):
        arguments = (
            x[:rows],
            one,
            zero,
            8,
            codes,
            panels(codes, 8, 1, inputs, 1),
            table,
            torch.ones(16),
            sums(integers(codes, "uniform", 8, inputs), inputs),
        )
        out = ops.packed_linear(*arguments, None, 8)
        assert torch.equal(out, (255.0 * levels.sum(1)).expand(rows, 16))


def test_threads_do_not_matter():
    arguments, _ = conv_arguments(CONVS[4], "uniform", 4, 8, batch=5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.packed_conv2d(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("columns", [1, 7, 16, 37, 129])
def test_decode_weight(each_isa, columns):
    for method, bits in (*((method, bits) for method, bits, _ in FORMATS), ("power_of_two", 7), ("uniform", 6)):
        codes, levels, scales, table, width = encoded(torch.randn(5, columns), method, bits)
        assert torch.equal(ops.decode_weight(codes, table, scales, width, columns), levels * scales.unsqueeze(1))


def samples():
    arguments, _ = conv_arguments(CONVS[0], "uniform", 4, 8)
    yield ops.packed_conv2d, arguments
    codes, _, scales, table, width = encoded(torch.randn(17, 40), "power_of_two", 4)
    made, total = panels(codes, width, 1, 40, 1), sums(integers(codes, "power_of_two", 4, 40), 40)
    x, step, zero = torch.randn(3, 40), torch.tensor(0.1), torch.tensor(3.0)
    yield ops.packed_linear, (x, step, zero, 8, codes, made, table, scales, total, None, width)
    yield ops.packed_linear_float, (x, codes, made, table, scales, None, width)
    yield ops.decode_weight, (codes, table, scales, width, 40)


def test_opcheck():
    for op, arguments in samples():
        opcheck(op.default, arguments)


def changed(place, value):
    arguments, _ = conv_arguments(CONVS[0], "uniform", 4, 8)
    return [*arguments[:place], value, *arguments[place + 1 :]]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(2, 3, 11), r"packed_conv2d: x must be \[N, C, H, W\]; got \[2, 3, 11\]"),
        (0, torch.randn(2, 4, 11, 13), r"packed_conv2d: codes must be \[16, 24\], for 36 levels of 4 bits; got \[16, 16\]"),
        (1, torch.ones(2), r"packed_conv2d: step must have 1 elements; got \[2\]"),
        (3, 9, "packed_conv2d: activation_bits must be between 1 and 8; got 9"),
        (6, torch.ones(8), r"packed_conv2d: levels must have 16 elements; got \[8\]"),
        (9, torch.ones(15), r"packed_conv2d: bias must have 16 elements; got \[15\]"),
        (10, 3, "packed_conv2d: storage_bits must be 2, 4 or 8; got 3"),
        (12, [0, 1], "packed_conv2d: kernel, stride and dilation must be positive"),
        (15, 5, "packed_conv2d: groups must divide the channels; got 5"),
        (15, 0, "packed_conv2d: groups must divide the channels; got 0"),
    ],
)
def test_bad_input_is_named(place, value, message, on_device):
    with pytest.raises(ValueError, match=message):
        ops.packed_conv2d(*on_device(changed(place, value)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, torch.tensor(300.0), "packed_conv2d: zero_point must be a whole number below"),
        (5, torch.zeros(1, 1, 64, dtype=torch.uint8), "packed_conv2d: panels must hold"),
        (6, torch.full((16,), 1000.0), "packed_conv2d: levels must be whole numbers within"),
    ],
)
def test_what_only_the_cpu_reads_is_named(place, value, message):
    with pytest.raises(ValueError, match=message):
        ops.packed_conv2d(*changed(place, value))


def test_bad_rows_are_named(on_device):
    (_, quantized), (_, floats) = list(samples())[1:3]
    for name, arguments, bias in (("packed_linear", quantized, 9), ("packed_linear_float", floats, 5)):
        op, codes = getattr(ops, name), 4 if bias == 9 else 1
        for place, value, error, message in (
            (0, torch.randn(3, 2, 20), ValueError, r"x must be \[N, C\]; got \[3, 2, 20\]"),
            (0, torch.randn(3, 40).half(), TypeError, "x must be Float; got Half"),
            (0, torch.randn(3, 50), ValueError, r"codes must be \[17, 32\], for 50 levels of 4 bits; got \[17, 24\]"),
            (codes, torch.ones(17, 24), TypeError, "codes must be Byte; got Float"),
            (bias, torch.ones(3), ValueError, r"bias must have 17 elements; got \[3\]"),
        ):
            with pytest.raises(error, match=f"{name}: {message}"):
                op(*on_device([*arguments[:place], value, *arguments[place + 1 :]]))


@pytest.mark.parametrize(("place", "name"), [(6, "levels"), (7, "scales"), (8, "sums"), (9, "bias")])
def test_strides_are_refused(place, name):
    arguments, _ = conv_arguments(CONVS[0], "uniform", 4, 8)
    gaps = [*arguments[:place], torch.stack([arguments[place]] * 2, 1)[:, 0], *arguments[place + 1 :]]
    with pytest.raises(ValueError, match=rf"packed_conv2d: {name} must be contiguous; got strides \[2\] of \[16\]"):
        ops.packed_conv2d(*gaps)
    (_, linear), (_, floats) = list(samples())[1:3]
    linear, floats = [*linear[:9], torch.randn(17), 4], [*floats[:5], torch.randn(17), 4]
    for op, call in ((ops.packed_linear, linear), (ops.packed_linear_float, floats)):
        for at, value in enumerate(call):
            if value is arguments[place] or not isinstance(value, torch.Tensor) or value.dim() != 1:
                continue
            with pytest.raises(ValueError, match="must be contiguous; got strides"):
                op(*call[:at], torch.stack([value] * 2, 1)[:, 0], *call[at + 1 :])


@pytest.mark.parametrize("place", [11, 12, 13, 14])
@pytest.mark.parametrize("size", [2**24 + 1, 2**62])
def test_huge_geometry_is_refused(place, size):
    arguments, _ = conv_arguments(CONVS[0], "uniform", 4, 8)
    with pytest.raises(ValueError, match=r"packed_conv2d: kernel, stride, padding and dilation must be at most 2\^24; got"):
        ops.packed_conv2d(*arguments[:place], [1, size], *arguments[place + 1 :])


def test_strides_beyond_the_image():
    arguments, levels = conv_arguments(CONVS[0], "uniform", 4, 8)
    arguments = [*arguments[:12], [2**24, 2**24], *arguments[13:]]
    assert torch.equal(ops.packed_conv2d(*arguments), expected_conv(arguments, levels))
