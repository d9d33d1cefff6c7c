"""Layers of 2 to 8 bits on a GPU: the CPU's bits, whichever kernel takes them."""

import copy

import pytest
import torch
from test_kernels import CONVS, FORMATS, conv_arguments, encoded
from torch import nn

import quantize
from quantize.packed.panels import integers, panels, sums

pytestmark = pytest.mark.gpu
ops = torch.ops.quantize

# The first fills the device with wide tiles, by words of each width; the last has words of padding only.
LARGE = [
    (128, 96, (3, 3), 1, (1, 1), (1, 1), (1, 1), 60, 60),
    (128, 36, (3, 3), 1, (1, 1), (1, 1), (1, 1), 60, 60),
    (96, 24, (1, 1), 1, (2, 2), (0, 0), (1, 1), 80, 80),
    (256, 128, (3, 3), 2, (2, 2), (1, 1), (1, 1), 14, 14),
    (24, 12, (3, 3), 12, (1, 1), (2, 1), (2, 1), 9, 11),
    (8, 16, (1, 1), 1, (3, 3), (1, 1), (1, 1), 1, 1),
]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def on_gpu(arguments):
    return [a.cuda() if torch.is_tensor(a) else a for a in arguments]


def assert_same(op, *arguments):
    want, got = op(*arguments), op(*on_gpu(arguments)).cpu()
    assert got.stride() == want.stride() and torch.equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("method", "bits", "activation_bits"), FORMATS)
@pytest.mark.parametrize("case", CONVS + LARGE)
def test_conv(case, method, bits, activation_bits, layout):
    arguments, _ = conv_arguments(case, method, bits, activation_bits, layout, batch=5)
    assert_same(ops.packed_conv2d, *arguments)
    out = ops.packed_conv2d(*arguments)
    for residual in (torch.randn_like(out), torch.randn(2, *out.shape), torch.randn(1, 1, 1)):
        assert_same(ops.packed_conv2d, *arguments, residual, -0.5, 2.0)
    assert_same(ops.packed_conv2d, *arguments, None, 0.0)


@pytest.mark.parametrize(("method", "bits", "activation_bits"), FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9, 150, 3000])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (257, 33), (64, 16), (513, 65), (1024, 130), (4608, 100)])
def test_linear(inputs, outputs, rows, method, bits, activation_bits):
    codes, levels, scales, table, width = encoded(torch.randn(outputs, inputs), method, bits)
    x, bias, step, zero_point = torch.randn(rows, inputs), torch.randn(outputs), torch.tensor(6.0 / 2**activation_bits), torch.tensor(1.0)
    made, total = panels(codes, width, 1, inputs, 1), sums(integers(codes, method, bits, inputs), inputs)
    assert_same(ops.packed_linear, x, step, zero_point, activation_bits, codes, made, table, scales, total, bias, width)
    want = (x.double() @ levels.double().T) * scales.double() + bias.double()
    got = ops.packed_linear_float(*on_gpu((x, codes, made, table, scales, bias, width))).cpu()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()) if rows else 0)


def test_extremes_and_numbers_that_are_none():
    arguments, _ = conv_arguments(CONVS[4], "uniform", 4, 8)
    x = arguments[0]
    flat = x.view(-1)
    flat[::7], flat[1::7], flat[2::7], flat[3::7] = torch.nan, torch.inf, -torch.inf, 1e30
    assert_same(ops.packed_conv2d, *arguments)
    for step in (0.0, -1.0, 1e-38):
        assert_same(ops.packed_conv2d, x, torch.tensor(step), *arguments[2:])


def test_other_strides_and_offsets():
    arguments, _ = conv_arguments(CONVS[4], "uniform", 4, 8, batch=4)
    x, codes, rest = arguments[0], arguments[4], on_gpu(arguments)
    want = ops.packed_conv2d(x[::2].contiguous(), *arguments[1:])
    gaps = x.cuda()[::2].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(ops.packed_conv2d(gaps, *rest[1:]).cpu(), want)
    apart = torch.empty(codes.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(codes).copy_(codes)  # at no multiple of 8 bytes
    assert torch.equal(ops.packed_conv2d(gaps, *rest[1:4], apart, *rest[5:]).cpu(), want)


def test_errors():
    arguments, _ = conv_arguments(CONVS[4], "uniform", 4, 8)
    with pytest.raises(ValueError, match="packed_conv2d: step must be on cuda:0; got cpu"):
        ops.packed_conv2d(arguments[0].cuda(), *arguments[1:])
    rest = on_gpu(arguments)
    with pytest.raises(ValueError, match="packed_conv2d: sums must be on cuda:0; got cpu"):
        ops.packed_conv2d(*rest[:8], arguments[8], *rest[9:])
    with pytest.raises(ValueError, match="packed_conv2d: sums must have 32 elements"):
        ops.packed_conv2d(*rest[:8], rest[8][:3], *rest[9:])


@pytest.mark.parametrize(
    "config", [quantize.Uniform(8, 8), quantize.PowerOfTwo(4, True, 8), quantize.DoReFa(4, 4), quantize.Uniform(4, 8)], ids=str
)
def test_converted_model(config):
    """Norms are folded and no library multiplies: every layer gets the CPU's bits, and so does the output."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, groups=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 10))
    quantize.prepare(model, config)
    model(torch.randn(4, 3, 10, 10))
    packed = quantize.convert(model.eval())
    other = copy.deepcopy(packed).cuda()
    for batch in (1, 4, 33):
        x = torch.randn(batch, 3, 10, 10)
        with torch.no_grad():
            want = packed(x)
            assert torch.equal(other(x.cuda()).cpu(), want)
            assert torch.equal(other(x.cuda().contiguous(memory_format=torch.channels_last)).cpu(), want)
            with torch.autocast("cuda", torch.float16):
                assert torch.equal(other(x.cuda()).cpu(), want)
