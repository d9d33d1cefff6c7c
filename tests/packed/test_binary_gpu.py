"""Binary layers on a GPU: the CPU's bits, whichever kernel takes them."""

import copy

import pytest
import torch
from test_binary_kernels import CONVS, LAYOUTS, bits_of, floats, made, packed_bits, signs, thresholds, weights
from test_binary_layers import block, layers_of, trained_norms
from torch import nn

import quantize

pytestmark = pytest.mark.gpu
ops = torch.ops.quantize

# The first fills the device with wide tiles; then groups of whole words, and outputs beyond the words of a tile.
LARGE = [
    (96, 128, (3, 3), 1, (1, 1), (1, 1), (1, 1), 60, 60),
    (128, 256, (3, 3), 2, (2, 2), (1, 1), (1, 1), 14, 14),
    (72, 64, (1, 1), 1, (1, 1), (0, 0), (1, 1), 9, 9),
]


def on_gpu(arguments):
    return [a.cuda() if torch.is_tensor(a) else a for a in arguments]


def assert_same(op, *arguments):
    want, got = op(*arguments), op(*on_gpu(arguments)).cpu()
    assert got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want)


def next_layer(outputs):
    whole = torch.iinfo(torch.int32)
    threshold = torch.randint(-5, 6, (outputs,), dtype=torch.int32)
    threshold[::3], threshold[1::4] = whole.max, whole.min
    return threshold, torch.randint(2, (outputs,), dtype=torch.uint8)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("case", CONVS + LARGE)
def test_conv(case, unit):
    outputs, inputs, kernel, groups, stride, padding, dilation, *_ = case
    x, weight, scales, bias = made(case, batch=5)
    packed, (threshold, flip), (next_threshold, next_flip) = weights(weight, groups), thresholds(inputs), next_layer(outputs)
    geometry = (inputs, *[list(pair) for pair in (kernel, stride, padding, dilation)], groups)
    sources = [(x.contiguous(memory_format=layout), t, f) for layout in LAYOUTS for t, f in ((None, None), (threshold, flip))]
    sources.append((packed_bits(bits_of(x, threshold, flip)), None, None))
    for source in sources:
        assert_same(ops.packed_binary_conv2d, *source, unit, *packed, scales, bias, None, None, *geometry)
        residual = torch.randn_like(ops.packed_binary_conv2d(*source, unit, *packed, scales, bias, None, None, *geometry))
        assert_same(ops.packed_binary_conv2d, *source, unit, *packed, scales, bias, None, None, *geometry, residual)
        assert_same(ops.packed_binary_conv2d, *source, unit, *packed, scales, None, next_threshold, None, *geometry)
        assert_same(ops.packed_binary_conv2d, *source, unit, *packed, scales, None, next_threshold, next_flip, *geometry)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 150, 3000])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (257, 33), (64, 16), (513, 65), (1024, 130), (4608, 100)])
def test_linear(inputs, outputs, rows, unit):
    x, scales, bias = floats(rows, inputs), torch.randn(outputs), torch.randn(outputs)
    packed, (threshold, flip), following = weights(signs(outputs, inputs)), thresholds(inputs), next_layer(outputs)
    for source in ((x, None, None), (x, threshold, flip), (packed_bits(bits_of(x)), None, None)):
        assert_same(ops.packed_binary_linear, *source, unit, *packed, scales, bias, None, None, inputs)
        assert_same(ops.packed_binary_linear, *source, unit, *packed, scales, None, *following, inputs)


def test_other_strides_offsets_and_empty_batches():
    x, weight, scales, bias = made(CONVS[2], batch=4)
    geometry = (16, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    after = (False, *weights(weight), scales, bias, None, None, *geometry)
    gaps = x.cuda()[::2].transpose(2, 3).contiguous().transpose(2, 3)
    want = ops.packed_binary_conv2d(x[::2].contiguous(), None, None, *after)
    assert torch.equal(ops.packed_binary_conv2d(gaps, None, None, *on_gpu(after)).cpu(), want)
    bits = packed_bits(bits_of(x)).cuda()
    apart = torch.empty(bits.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(bits).copy_(bits)  # at no multiple of 8 bytes
    want = ops.packed_binary_conv2d(x, None, None, *after)
    assert torch.equal(ops.packed_binary_conv2d(apart, None, None, *on_gpu(after)).cpu(), want)
    assert ops.packed_binary_conv2d(x[:0].cuda(), None, None, *on_gpu(after)).shape == (0, 33, 9, 31)


def test_more_words_than_a_grid_has_rows():
    x, scales = floats(1, 2_097_153, 1, 2), torch.ones(2)
    geometry = (x.shape[1], [1, 1], [1, 1], [0, 0], [1, 1], 1)
    assert_same(ops.packed_binary_conv2d, x, None, None, False, *weights(signs(2, x.shape[1], 1, 1)), scales, *[None] * 3, *geometry)


def test_errors():
    x, weight, scales, bias = made(CONVS[2])
    after = (False, *weights(weight), scales, bias, None, None, 16, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match="packed_binary_conv2d: codes must be on cuda:0; got cpu"):
        ops.packed_binary_conv2d(x.cuda(), None, None, *after)
    after = on_gpu(after)
    after[1] = after[1][:, :8].contiguous()
    with pytest.raises(ValueError, match=r"packed_binary_conv2d: codes must be contiguous \[33, 24\]; got \[33, 8\]"):
        ops.packed_binary_conv2d(x.cuda(), None, None, *after)


@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.DoReFa(1, 1)], ids=lambda c: type(c).__name__)
def test_converted_model(config):
    """Nothing but binary layers, whose norms are thresholds: no library multiplies."""
    model = nn.Sequential(*block(24, 96), *block(96, 70, stride=2), *block(70, 33))
    quantize.prepare(trained_norms(model), {"*": config}).eval()
    packed = quantize.convert(model)
    assert len(layers_of(packed)) == 3 and sum(type(m) is nn.Identity for m in packed) == 6
    x = floats(5, 24, 20, 20)
    with torch.no_grad():
        want, other = packed(x), copy.deepcopy(packed).cuda()
        assert torch.equal(other(x.cuda()).cpu(), want)
        assert torch.equal(other(x.cuda().contiguous(memory_format=torch.channels_last)).cpu(), want)
