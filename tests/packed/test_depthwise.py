"""Convolutions of one input channel a group: exact against float64, the products of bytes to the bit."""

import copy

import pytest
import torch
from test_kernels import conv_arguments, expected_conv
from torch import nn
from torch.library import opcheck

import quantize
from quantize.packed import kernels
from quantize.packed.panels import Integers, tap_levels

ops = torch.ops.quantize
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# outputs, inputs, kernel, groups, stride, padding, dilation, height, width
CONVS = [
    (16, 16, (3, 3), 16, (1, 1), (1, 1), (1, 1), 9, 31),
    (33, 33, (3, 3), 33, (2, 2), (1, 1), (1, 1), 14, 14),
    (5, 5, (3, 3), 5, (2, 2), (0, 0), (1, 1), 8, 33),
    (17, 17, (5, 5), 17, (2, 2), (2, 2), (1, 1), 7, 67),
    (3, 3, (7, 7), 3, (1, 1), (3, 3), (1, 1), 1, 1),
    (40, 20, (3, 3), 20, (1, 1), (1, 1), (1, 1), 7, 7),
    (51, 17, (3, 5), 17, (3, 4), (4, 9), (2, 3), 13, 40),
    (18, 18, (1, 1), 18, (2, 1), (0, 0), (1, 1), 5, 4),
    (4, 4, (1, 9), 4, (1, 1), (0, 4), (1, 1), 1, 50),
    (6, 6, (2, 2), 6, (1, 2), (0, 5), (1, 1), 3, 4),
    (2, 2, (3, 3), 2, (9, 9), (1, 1), (1, 1), 6, 6),
    (35, 35, (3, 3), 35, (1, 1), (12, 12), (12, 12), 25, 20),
    (20, 20, (3, 3), 20, (1, 1), (1, 1), (1, 1), 130, 140),
    (16, 16, (3, 3), 16, (2, 2), (1, 1), (1, 1), 260, 200),
]


def arguments_of(case, method="uniform", bits=8, activation_bits=8, layout=torch.contiguous_format, batch=2):
    """The op's arguments with the panel of taps, and those with panels of bytes."""
    of_bytes, levels = conv_arguments(case, method, bits, activation_bits, layout, batch)
    taps = case[2][0] * case[2][1]
    panel = tap_levels(Integers(of_bytes[4], of_bytes[10], of_bytes[6]), taps, case[1])
    return (*of_bytes[:5], panel, *of_bytes[6:]), of_bytes, levels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("method", "bits", "activation_bits"), [("uniform", 8, 8), ("uniform", 3, 4), ("power_of_two", 4, 8)])
def test_conv_is_exact(each_isa, method, bits, activation_bits, layout):
    for case in CONVS:
        arguments, of_bytes, levels = arguments_of(case, method, bits, activation_bits, layout)
        out = ops.packed_conv2d(*arguments)
        assert torch.equal(out, expected_conv(of_bytes, levels)), case
        assert torch.equal(out, ops.packed_conv2d(*of_bytes)) and out.stride() == ops.packed_conv2d(*of_bytes).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_ties_infinities_and_nan(each_isa, layout, stride):
    case = (19, 19, (3, 3), 19, (stride, stride), (1, 1), (1, 1), 7, 37)
    arguments, of_bytes, _ = arguments_of(case, layout=layout)
    step = float(arguments[1])
    values = [0.0, -0.0, 0.5, 1.5, -2.5, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 1e-40]
    x = (torch.tensor(values) * step)[torch.randint(len(values), (2, 19, 7, 37))].contiguous(memory_format=layout)
    assert torch.equal(ops.packed_conv2d(x, *arguments[1:]), ops.packed_conv2d(x, *of_bytes[1:]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_largest_sums_are_exact(each_isa, layout):
    """As many taps as float32 has room for, all of them at the ends of their ranges; and one more, which the op refuses."""
    taps = kernels.MOST_TAPS
    arguments, _, _ = arguments_of((17, 17, (1, taps), 17, (1, 1), (0, 0), (1, 1), 1, taps + 20), layout=layout)
    arguments = [*arguments[:5], torch.full((1, taps, 32), 127.0), *arguments[6:]]
    arguments[1], arguments[2], arguments[7], arguments[9] = torch.tensor(1.0), torch.tensor(0.0), torch.ones(17), None
    x = torch.full((1, 17, 1, taps + 20), 1e9).contiguous(memory_format=layout)
    x[..., ::2] = 254  # odd sums, of which float32 would drop the last bit where it had to round
    even, odd = taps // 2 + taps % 2, taps // 2
    out = ops.packed_conv2d(x, *arguments[1:])
    assert (out[..., ::2] == float(127 * (254 * even + 255 * odd))).all() and (
        out[..., 1::2] == float(127 * (254 * odd + 255 * even))
    ).all()
    with pytest.raises(ValueError, match=f"taps at most {taps} where panels are floats; got 17 and {taps + 1}"):
        ops.packed_conv2d(*arguments_of((17, 17, (1, taps + 1), 17, (1, 1), (0, 0), (1, 1), 1, taps + 1))[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_batches(each_isa, layout):
    before = torch.get_num_threads()
    for case, batch in ((CONVS[1], 5), (CONVS[5], 3), (CONVS[12], 1), (CONVS[0], 0)):
        arguments, of_bytes, levels = arguments_of(case, layout=layout, batch=batch)
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                assert torch.equal(ops.packed_conv2d(*arguments), expected_conv(of_bytes, levels))
        finally:
            torch.set_num_threads(before)


def test_opcheck(each_isa):
    opcheck(ops.packed_conv2d.default, arguments_of(CONVS[1])[0])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (5, torch.zeros(1, 9, 15), r"panels must be contiguous \[1, 9, 16\]; got \[1, 9, 15\]"),
        (5, torch.zeros(1, 16, 9).mT, r"panels must be contiguous \[1, 9, 16\]; got \[1, 9, 16\]"),
        (5, torch.zeros(9, 16), r"panels must be contiguous \[1, 9, 16\]; got \[9, 16\]"),
        (5, torch.zeros(1, 9, 16, dtype=torch.float64), "panels must be .*Byte"),
        (8, torch.zeros(15, dtype=torch.int32), "sums must have 16 elements"),
        (2, torch.tensor(0.5), "zero_point must be a whole number"),
    ],
)
def test_bad_arguments(place, value, message):
    arguments = list(arguments_of(CONVS[0])[0])
    arguments[place] = value
    with pytest.raises((ValueError, TypeError), match=message):
        ops.packed_conv2d(*arguments)


def test_channels_of_larger_groups_are_refused():
    arguments, _, _ = arguments_of((16, 16, (3, 3), 8, (1, 1), (1, 1), (1, 1), 5, 5))
    with pytest.raises(ValueError, match="groups must be the channels, 16, and taps at most 518 where panels are floats; got 8 and 9"):
        ops.packed_conv2d(*arguments[:5], torch.zeros(1, 9, 16), *arguments[6:])


CONFIGS = [
    quantize.Uniform(8, activation_bits=8),
    quantize.Uniform(3, activation_bits=4),
    quantize.PowerOfTwo(4, activation_bits=8),
    quantize.Ternary(activation_bits=2),
    quantize.DoReFa(2, 4),
    quantize.DoReFa(1, 2),
]
LAYERS = [
    nn.Conv2d(12, 12, 3, padding=1, groups=12),
    nn.Conv2d(12, 36, 5, stride=2, padding=2, groups=12, bias=False),
    nn.Conv2d(12, 12, 3, padding="same", groups=12, padding_mode="reflect"),
    nn.Conv2d(12, 12, (2, 4), padding="same", groups=12),
    nn.Conv1d(12, 12, 7, padding=3, groups=12),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: repr(c)[:40])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}, {layer.kernel_size}")
def test_layers_run_on_their_codes(each_isa, layer, config):
    prepared = quantize.prepare(nn.Sequential(nn.ReLU(), copy.deepcopy(layer)), config).eval()
    x = torch.randn(2, 12, *[11] * (2 if isinstance(layer, nn.Conv2d) else 1))
    prepared(x)
    packed = quantize.convert(prepared)
    assert kernels.reason(packed[1]) == ""
    with torch.no_grad():
        torch.testing.assert_close(packed(x), prepared(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed(x[0]), prepared(x[0]), rtol=1e-5, atol=1e-5)


def test_what_they_do_not_take_is_decoded():
    def why(layer, activation_bits=8):
        prepared = quantize.prepare(nn.Sequential(layer), quantize.Uniform(8, activation_bits=activation_bits))
        prepared(torch.randn(1, 8, 3, 600))
        return kernels.reason(quantize.convert(prepared)[0])

    assert why(nn.Conv2d(8, 8, (1, 519), groups=8)) == "decoded at each use: groups of 1 to 1 channels"
    assert why(nn.Conv2d(8, 8, (1, 518), groups=8)) == ""
    assert why(nn.Conv2d(8, 8, 3, groups=4)) == "decoded at each use: groups of 2 to 2 channels"
    assert why(nn.Conv2d(8, 8, 3, groups=8), None) == "decoded at each use: float inputs"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_and_saved(tmp_path, layout):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1))
    prepared = quantize.prepare(copy.deepcopy(model), quantize.Uniform(4, activation_bits=8))
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=layout)
    prepared(x)
    packed = quantize.convert(prepared)
    with torch.no_grad():
        expected = packed(x)
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        quantize.save(packed, tmp_path / "model.qz")
        assert torch.equal(quantize.load(copy.deepcopy(model), tmp_path / "model.qz")(x), expected)
