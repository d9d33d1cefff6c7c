"""norm_dequantize: what a batch norm and a ReLU made, of the norm's packed normalized input."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

ops = torch.ops.quantize
SEED = torch.tensor([3, 4])
SHAPES = [(4, 5, 6, 7), (3, 16, 8, 8), (2, 24, 5, 3), (5, 3, 40), (6, 20), (2, 3, 3, 4, 8), (1, 70, 130, 3)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def parameters(channels, dtype=torch.float32):
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def inputs(shape, dtype=torch.float32):
    x = torch.randn(shape).to(dtype)
    return [x, x.contiguous(memory_format=FORMATS[len(shape)])] if len(shape) in FORMATS else [x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [64, 100, 0, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_norm_and_relu_of_what_was_unpacked(each_isa, shape, group_size, dtype):
    """To a rounding of float32, and of `dtype`; exactly zero, or times the slope, where the mask says so."""
    for x in inputs(shape, dtype):
        codes, ranges = ops.group_quantize(x, 4, group_size, SEED)
        unpacked = ops.group_dequantize(codes, ranges, None, 4, group_size, x.shape, x.stride(), dtype, SEED)
        weight, bias = parameters(shape[1])
        along = (1, -1, *[1] * (len(shape) - 2))
        y, mask = ops.clip_mask(torch.empty_like(x).copy_(torch.randn(shape)), 0.0, float("nan"), 0.0)
        for w, b, m, slope in ((weight, bias, mask, 0.0), (None, bias, None, 0.0), (weight, None, mask, 0.25), (None, None, None, 0.0)):
            arguments = (codes, ranges, None, 4, group_size, x.shape, x.stride(), dtype, SEED, w, b, m)
            found = ops.norm_dequantize(*arguments, slope)
            want = unpacked.float() * (1 if w is None else w.view(along)) + (0 if b is None else b.view(along))
            want = want if m is None else torch.where(y > 0, want, want * slope)
            assert found.dtype == dtype and found.stride() == x.stride()
            torch.testing.assert_close(found.float(), want, rtol=torch.finfo(dtype).eps * 2, atol=1e-5)
            if m is not None and not slope:
                assert ((found == 0) | (y > 0)).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_samples_and_threads(each_isa, threads):
    x, bits = torch.randn(4, 16, 30, 20), torch.tensor([1, 8, 2, 4], dtype=torch.uint8)
    codes, ranges = ops.group_quantize_mixed(x, bits, 15, 64, SEED)
    weight, bias = parameters(16)
    layout = (bits, 0, 64, x.shape, x.stride(), x.dtype, SEED)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = ops.norm_dequantize(codes, ranges, *layout, weight, bias, None)
    finally:
        torch.set_num_threads(before)
    want = F.batch_norm(ops.group_dequantize(codes, ranges, *layout), torch.zeros(16), torch.ones(16), weight, bias, eps=0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def sample(shape, mask=True):
    x = torch.randn(shape)
    codes, ranges = ops.group_quantize(x, 2, 64, SEED)
    bits = ops.pack_mask(x > 0) if mask else None
    return codes, ranges, None, 2, 64, x.shape, x.stride(), x.dtype, SEED, *parameters(shape[1]), bits


@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (6, 20)], ids=str)
def test_opcheck(shape):
    opcheck(ops.norm_dequantize.default, sample(shape))
    opcheck(ops.norm_dequantize.default, sample(shape, mask=False))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape, mask):
    """To a rounding: the multiplication and the sum are ATen's there."""
    arguments = sample(shape, mask)
    want = ops.norm_dequantize(*arguments)
    moved = [a.cuda() if torch.is_tensor(a) and a.dtype != torch.int64 else a for a in arguments]
    torch.testing.assert_close(ops.norm_dequantize(*moved).cpu(), want, rtol=1e-5, atol=1e-5)


def test_errors():
    arguments = list(sample((4, 5, 6, 7)))
    for place, value, message in (
        (9, torch.randn(4), "weight must have 5 elements"),
        (10, torch.randn(6), "bias must have 5 elements"),
        (11, arguments[11][:-1], "mask must have 105 elements"),
        (6, (1, 4, 20, 140), "stride dense with samples outermost"),
        (1, arguments[1][:-1], "ranges must have"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.norm_dequantize(*arguments[:place], value, *arguments[place + 1 :])
