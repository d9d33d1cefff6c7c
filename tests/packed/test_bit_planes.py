"""Convolutions as sums of binary ones: the bytes' own results, to the bit."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck

import quantize
from quantize import _C
from quantize.packed import kernels
from quantize.packed.binary_panels import plane_panels
from quantize.packed.layout import levels_table, pack, to_rows
from quantize.packed.panels import integers, panels, sums

ops = torch.ops.quantize
LOOKUP = [isa for isa in _C.supported_isas() if isa != "portable"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# outputs, inputs, kernel, groups, stride, padding, dilation, height, width
CONVS = [
    (16, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 31),
    (33, 4, (3, 3), 1, (1, 1), (1, 1), (1, 1), 11, 13),
    (5, 68, (5, 5), 1, (1, 1), (2, 2), (2, 2), 12, 9),
    (24, 136, (1, 1), 2, (3, 2), (0, 0), (1, 1), 5, 31),
    (7, 3, (1, 1), 1, (1, 1), (0, 0), (1, 1), 4, 5),
    (20, 256, (3, 3), 1, (2, 1), (1, 0), (1, 1), 13, 13),
    (48, 96, (3, 3), 3, (1, 2), (2, 1), (1, 2), 8, 7),
    (4, 8, (3, 3), 1, (3, 3), (4, 4), (1, 1), 1, 1),
]


@pytest.fixture(params=LOOKUP)
def lookup_isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def both(case, bits, activation_bits, x=None, layout=torch.contiguous_format):
    """Arguments of the op with panels of bit planes, and with those of bytes."""
    outputs, inputs, kernel, groups, stride, padding, dilation, height, width = case
    levels = torch.randint(2**bits, (outputs, inputs // groups, *kernel)).float() * 2 - (2**bits - 1)
    codes, k = pack(to_rows(levels), "dorefa", bits), levels[0].numel()
    weight = integers(codes, "dorefa", bits, k)
    x = torch.randn(2, inputs, height, width) if x is None else x
    made = panels(weight.codes, weight.width, kernel[0] * kernel[1], inputs // groups, groups)
    before = (x.contiguous(memory_format=layout), torch.tensor(1 / 3), torch.tensor(0.0), activation_bits, weight.codes)
    behind = (weight.levels, torch.rand(outputs), sums(weight, k), torch.randn(outputs), weight.width)
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    return (*before, plane_panels(codes, bits, k, groups), *behind, *geometry), (*before, made, *behind, *geometry)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bits", "activation_bits"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_conv_is_that_of_bytes(lookup_isa, bits, activation_bits, layout):
    for case in CONVS:
        planes, whole = both(case, bits, activation_bits, layout=layout)
        out = ops.packed_conv2d(*planes)
        assert torch.equal(out, ops.packed_conv2d(*whole)), case
        assert out.stride() == ops.packed_conv2d(*whole).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_infinities_and_nan(lookup_isa, layout):
    x = torch.tensor([0.0, -0.0, 1 / 6, 0.5, 5 / 6, 1.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e-30])[torch.randint(11, (2, 16, 7, 19))]
    planes, whole = both((16, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 7, 19), 1, 2, x, layout)
    assert torch.equal(ops.packed_conv2d(*planes), ops.packed_conv2d(*whole))


def test_threads_and_empty_batches(lookup_isa):
    planes, _ = both(CONVS[5], 2, 1)
    one, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            one.append(ops.packed_conv2d(*planes))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2])
    assert ops.packed_conv2d(planes[0][:0], *planes[1:]).shape == (0, *one[0].shape[1:])


def test_opcheck(lookup_isa):
    planes, _ = both(CONVS[0], 2, 1)
    opcheck(ops.packed_conv2d.default, planes)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, torch.tensor(1.0), "zero_point 0"),
        (3, 3, "activation_bits must be at most 2"),
        (4, torch.zeros(16, 8, dtype=torch.uint8), r"codes must be \[16, 40\]"),
        (5, torch.zeros(3, 1, 4, 36, 4, dtype=torch.uint8), "panels must be one or two planes"),
        (5, torch.zeros(0, 1, 4, 36, 4, dtype=torch.uint8), "panels must be one or two planes"),
        (5, torch.zeros(1, 1, 4, 35, 4, dtype=torch.uint8), "panels must be one or two planes"),
        (5, torch.zeros(1, 1, 4, 36, 4), "Byte"),
        (8, torch.zeros(15, dtype=torch.int32), "sums"),
        (9, torch.zeros(15), "bias"),
    ],
)
def test_bad_arguments(lookup_isa, place, value, message):
    planes, _ = both(CONVS[0], 1, 2)
    arguments = [value if i == place else argument for i, argument in enumerate(planes)]
    with pytest.raises((ValueError, TypeError), match=message):
        ops.packed_conv2d(*arguments)


def test_channels_must_come_in_fours(lookup_isa):
    planes, _ = both((8, 6, (3, 3), 1, (1, 1), (1, 1), (1, 1), 5, 5), 1, 2)
    with pytest.raises(ValueError, match="channels in fours"):
        ops.packed_conv2d(*planes)


def test_portable_says_what_it_has_not():
    planes, _ = both(CONVS[0], 1, 2)
    before = _C.cpu_isa()
    _C.set_cpu_isa("portable")
    try:
        with pytest.raises(ValueError, match="bit planes are for AVX2"):
            ops.packed_conv2d(*planes)
    finally:
        _C.set_cpu_isa(before)


@pytest.mark.parametrize(("bits", "activation_bits"), [(1, 2), (2, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("conv", [nn.Conv2d(8, 12, 3, padding=1), nn.Conv1d(8, 12, 3, stride=2, padding=1)])
def test_layers_choose_them_where_they_are_faster(each_isa, conv, bits, activation_bits):
    prepared = quantize.prepare(nn.Sequential(nn.ReLU(), copy.deepcopy(conv)), quantize.DoReFa(bits, activation_bits)).eval()
    packed = quantize.convert(prepared)
    x = torch.randn(2, 8, *[11] * packed[1].spatial)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), prepared(x), rtol=1e-6, atol=1e-6)
    found = kernels._in_bit_planes(packed[1])
    assert found == (bits * activation_bits == 2 and each_isa == "avx2")


def test_levels_are_the_planes_sum():
    levels = torch.tensor([[-3.0, -1.0, 1.0, 3.0, 3.0, -3.0, 1.0, -1.0]])
    codes = pack(levels, "dorefa", 2)
    made = plane_panels(codes, 2, 8)  # [planes, groups, fours, quads, channels]
    bits = (made[:, 0, 0, :, 0].unsqueeze(-1) >> torch.arange(4, 8)) & 1
    signs = 1 - 2 * bits.flatten(1).float()
    assert torch.equal(signs[0] + 2 * signs[1], levels[0])
    assert levels_table("dorefa", 2).tolist() == [1, 3, -3, -1]
