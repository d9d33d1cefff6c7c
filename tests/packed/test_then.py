"""What a convolution does behind its sums: a residual, a clip, codes for the next one. The same bits as one after the other."""

import itertools

import pytest
import torch
from test_bit_planes import both
from test_depthwise import arguments_of
from test_kernels import conv_arguments
from torch.library import opcheck

from quantize import _C

ops = torch.ops.quantize
LAYOUTS = [torch.contiguous_format, torch.channels_last]
STEP, ZERO = torch.tensor(0.31), torch.tensor(5.0)

# outputs, inputs, kernel, groups, stride, padding, dilation, height, width
CONVS = [
    (16, 3, (3, 3), 1, (1, 1), (1, 1), (1, 1), 11, 13),
    (17, 16, (1, 1), 1, (2, 2), (0, 0), (1, 1), 9, 9),
    (33, 20, (1, 1), 1, (1, 1), (0, 0), (1, 1), 6, 7),
    (70, 18, (5, 5), 1, (1, 1), (2, 2), (2, 2), 12, 9),
    (96, 96, (3, 3), 3, (2, 1), (1, 0), (1, 1), 8, 7),
    (33, 17, (1, 5), 1, (1, 2), (0, 2), (1, 1), 3, 31),
    (40, 64, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 8),
    (30, 60, (3, 3), 6, (1, 1), (1, 1), (1, 1), 5, 6),
    (64, 32, (3, 3), 1, (1, 1), (0, 0), (1, 1), 3, 3),
    (19, 19, (3, 3), 19, (1, 1), (1, 1), (1, 1), 9, 10),
    (48, 48, (5, 5), 48, (2, 2), (2, 2), (1, 1), 9, 11),
    (40, 20, (3, 3), 20, (1, 1), (1, 1), (1, 1), 7, 7),
]
LIMITS = [(None, None), (0.0, None), (0.0, 6.0), (None, 0.5)]


def arguments(case, layout, batch=2):
    """Of the op, with the panels that a layer of that shape has."""
    if case[1] == case[3] > 1:
        return arguments_of(case, layout=layout, batch=batch)[0]
    return conv_arguments(case, "uniform", 8, 8, layout, batch)[0]


def clipped(x, low, high):
    return x if low is None and high is None else x.clamp(low, high)


def codes_of(x, bits):
    """x in the layout that the op gives codes in, as a plain uint8 tensor."""
    return (ops.lsq_quantize(x, STEP, ZERO, 2**bits - 1) / STEP + ZERO).round().to(torch.uint8)


def plain(codes):
    """[N, C, H, W]"""
    return codes.squeeze(3).permute(0, 3, 1, 2) if codes.dim() == 5 else codes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_sums_clips_and_codes(each_isa, case, layout):
    args = arguments(case, layout)
    floats = ops.packed_conv2d(*args)
    residual = torch.randn_like(floats)
    for (low, high), added in itertools.product(LIMITS, (None, residual, residual.contiguous(), residual[:, :1], residual[0].double())):
        want = clipped(floats if added is None else floats + added, low, high)
        got = ops.packed_conv2d(*args, added, low, high)
        assert torch.equal(got, want) and got.dtype == want.dtype, (low, high)
        if added is None or added.dtype == torch.float32:
            codes = ops.packed_conv2d(*args, added, low, high, STEP, ZERO, 7)
            assert codes.dim() == (4 if args[0].is_contiguous() else 5)
            assert torch.equal(plain(codes), codes_of(want, 7)), (low, high)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("second", range(len(CONVS)))
def test_codes_are_as_good_as_floats(each_isa, second, layout):
    """The second convolution's output, and its codes, from what the first one hands on."""
    outputs, inputs, kernel, groups, *_, height, width = case = CONVS[second]
    first = arguments((inputs, 8, (3, 3), 1, (1, 1), (1, 1), (1, 1), height, width), layout)
    args = arguments(case, layout)
    step, zero_point, bits = args[1], args[2], args[3]
    floats = ops.packed_conv2d(*first, None, 0.0, None)
    codes = ops.packed_conv2d(*first, None, 0.0, None, step, zero_point, bits)
    want, got = ops.packed_conv2d(floats, *args[1:]), ops.packed_conv2d(codes, *args[1:])
    assert torch.equal(got, want) and got.stride() == want.stride()
    residual = torch.randn_like(want)
    assert torch.equal(ops.packed_conv2d(codes, *args[1:], residual, 0.0), (want + residual).clamp(min=0.0))
    further = ops.packed_conv2d(codes, *args[1:], None, 0.0, 6.0, STEP, ZERO, 8)
    assert torch.equal(plain(further), codes_of(want.clamp(0.0, 6.0), 8)) and further.dim() == codes.dim()
    moved = codes.clone(memory_format=torch.preserve_format)  # without room behind it, as what a cache or another process hands on
    if plain(moved).stride() == plain(codes).stride():
        assert torch.equal(ops.packed_conv2d(moved, *args[1:]), want)


def test_bit_planes_do_it_afterwards():
    before = _C.cpu_isa()
    if "avx2" not in _C.supported_isas():
        pytest.skip("bit planes are for AVX2")
    _C.set_cpu_isa("avx2")
    try:
        planes, whole = both((16, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 31), 1, 2)
        residual = torch.randn_like(ops.packed_conv2d(*whole))
        for arguments in ((residual, 0.0, 3.0), (None, 0.0, None, STEP, ZERO, 4)):
            assert torch.equal(ops.packed_conv2d(*planes, *arguments), ops.packed_conv2d(*whole, *arguments))
        codes = ops.packed_conv2d(*whole, None, None, None, STEP, ZERO, 4)
        with pytest.raises(ValueError, match="x must be floats where panels are bit planes; got codes"):
            ops.packed_conv2d(codes, *planes[1:])
    finally:
        _C.set_cpu_isa(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CONVS[6], CONVS[10]], ids=str)
def test_empty_batches_and_threads(each_isa, case, layout):
    args, found, before = arguments(case, layout, batch=3), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(ops.packed_conv2d(*args, None, 0.0, None, STEP, ZERO, 8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    empty = ops.packed_conv2d(args[0][:0], *args[1:], None, 0.0, None, STEP, ZERO, 8)
    assert plain(empty).shape == (0, *plain(found[0]).shape[1:]) and empty.dtype == torch.uint8
    assert ops.packed_conv2d(empty if case[0] == case[1] else args[0][:0], *args[1:], None, 0.0).shape[0] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CONVS[2], CONVS[10]], ids=str)
def test_opcheck(case, layout):
    args = arguments(case, layout)
    opcheck(ops.packed_conv2d.default, (*args, torch.randn_like(ops.packed_conv2d(*args)), 0.0, 6.0))
    utils = ("test_schema", "test_faketensor")  # codes have no derivative, and lie in a larger tensor
    opcheck(ops.packed_conv2d.default, (*args, None, 0.0, None, STEP, ZERO, 8), test_utils=utils)


def test_bad_arguments():
    args = arguments(CONVS[2], torch.contiguous_format)
    codes = ops.packed_conv2d(
        *arguments((20, 8, (1, 1), 1, (1, 1), (0, 0), (1, 1), 6, 7), torch.contiguous_format), None, None, None, STEP, ZERO, 8
    )
    for more, message in (
        ((None, None, None, None, None, 8), "next_bits must come with next_step and next_zero_point"),
        ((None, None, None, STEP, ZERO, 9), "activation_bits must be between 1 and 8; got 9"),
        ((None, None, None, STEP, torch.tensor(0.5), 8), "zero_point must be a whole number"),
        ((None, None, None, torch.ones(2), ZERO, 8), "step must have 1 element"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.packed_conv2d(*args, *more)
    assert ops.packed_conv2d(codes, *args[1:]).shape == (2, 33, 6, 7)
    short = torch.zeros(2 * 6 * 7 * 20 - 3, dtype=torch.uint8).as_strided((2, 17, 6, 7), (840, 1, 140, 20))
    seventeen = arguments((33, 17, (1, 1), 1, (1, 1), (0, 0), (1, 1), 6, 7), torch.contiguous_format)
    with pytest.raises(ValueError, match="x must be codes whose last pixel is filled up, of 1680 bytes; got 1677"):
        ops.packed_conv2d(short, *seventeen[1:])
    with pytest.raises(ValueError, match="x must be codes as packed_conv2d gives them, of strides"):
        ops.packed_conv2d(codes.contiguous(), *args[1:])
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\]"):
        ops.packed_conv2d(codes[0], *args[1:])
