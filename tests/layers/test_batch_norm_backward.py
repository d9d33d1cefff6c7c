"""The batch norm's backward from packed bits of its normalized input: equal to PyTorch's on the decoded one, in every layout, and the same
on every ISA."""

import pytest
import torch
from same_bits import assert_isas_agree
from torch.library import opcheck

from quantize import _C

ops = torch.ops.quantize
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows and columns swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels between": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # goes by PyTorch's kernel
}
SHAPES = [(8, 16, 32, 32), (4, 5, 6, 7), (3, 300, 5, 5), (2, 3, 200, 301), (130, 64, 1, 1), (1, 2, 3, 1)]


def arguments(x, bits=4, group_size=256, training=True, weight=True, mask=(True, True, True), energy=True, sample_bits=None):
    """The op's arguments for x and a random output gradient, and the decoded normalized x."""
    channels, axes = x.shape[1], [d for d in range(x.dim()) if d != 1]
    seed, size, stride = torch.tensor([1, 2]), list(x.shape), _C.packed_strides(list(x.shape), list(x.stride()))
    variance, mean = torch.var_mean(x.float(), axes, correction=0)
    if not training:
        mean, variance = mean + 0.1, variance + 0.1
    inverse_std = (variance + 1e-5).rsqrt()
    if sample_bits is None:
        codes, ranges = ops.norm_quantize(x, mean, inverse_std, bits, group_size, seed)
    else:
        bits = 0
        codes, ranges = ops.norm_quantize_mixed(x, mean, inverse_std, sample_bits, int(sample_bits.sum()), group_size, seed)
    packed = (codes, ranges, sample_bits, bits, group_size)
    weight = torch.randn(channels) if weight else None
    own = (torch.randn_like(x), *packed, size, stride, seed, weight, inverse_std, training, list(mask), energy)
    return own, ops.group_dequantize(*packed, size, stride, x.dtype, seed)


def expected(own, x):
    """PyTorch's gradients of the decoded x, of channels whose mean is 0 and whose deviation is 1, in double."""
    inverse_std = own[10].double()
    gain = inverse_std if own[9] is None else own[9].double() * inverse_std
    zeros, ones = torch.zeros_like(gain), torch.ones_like(gain)
    return torch.ops.aten.native_batch_norm_backward(own[0].double(), x.double(), gain, zeros, ones, zeros, ones, own[11], 0.0, own[12])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_pytorch_on_the_decoded_input(shape, layout, each_isa):
    x = LAYOUTS[layout](torch.randn(shape) * 2 + 1)
    for group_size in (256, 100, 0):
        for training in (True, False):
            own, decoded = arguments(x, group_size=group_size, training=training)
            got = ops.batch_norm_backward(*own)
            for a, b in zip(got, expected(own, decoded), strict=False):
                assert (a - b).norm() <= 1e-5 * b.norm()
            if layout in ("contiguous", "channels_last"):
                assert got[0].stride() == decoded.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, each_isa):
    for layout in LAYOUTS.values():
        own, decoded = arguments(layout(torch.randn(4, 20, 9, 11).to(dtype)))
        got = ops.batch_norm_backward(*own)
        assert got[0].dtype == dtype
        assert got[1].dtype == torch.float32
        for a, b in zip(got, expected(own, decoded), strict=False):
            torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2 * float(b.abs().max()) if a.dtype == dtype else 1e-4)


@pytest.mark.parametrize("shape", [(3, 10), (4, 6, 50), (2, 5, 4, 6, 8)])
@pytest.mark.parametrize(
    "options", [{"weight": False}, {"mask": (False, True, True)}, {"mask": (True, False, False)}, {"bits": 1}], ids=str
)
def test_other_ranks_and_options(shape, options):
    own, decoded = arguments(torch.randn(shape), **options)
    got, want = ops.batch_norm_backward(*own), expected(own, decoded)
    for asked, a, b in zip(own[12], got, want, strict=False):
        assert a is None if not asked else (a - b).norm() <= 1e-5 * b.norm()


def test_bits_of_each_sample(each_isa):
    x = torch.randn(6, 20, 17, 5)
    own, decoded = arguments(x, sample_bits=torch.tensor([1, 2, 8, 4, 2, 1], dtype=torch.uint8))
    for a, b in zip(ops.batch_norm_backward(*own), expected(own, decoded), strict=False):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
def test_every_isa_and_any_threads_give_the_same_bits(layout):
    x = LAYOUTS[layout](torch.randn(9, 24, 33, 31))

    def run():
        found = []
        for threads in (1, 2, 3):
            torch.manual_seed(1)
            torch.set_num_threads(threads)
            found.append(ops.batch_norm_backward(*arguments(x)[0]))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        return found[0]

    assert_isas_agree(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_energies_as_defined(layout):
    # csrc/layers/energy.h, written out.
    x = LAYOUTS[layout](torch.randn(6, 8, 13, 5) * 3)
    own, decoded = arguments(x)
    grad, gain = own[0], (own[9] * own[10]).square()
    energy = ops.batch_norm_backward(*own)[3]
    count, positions = x.numel() / 8, 13 * 5
    squares = grad.square().sum((2, 3))
    own_share = (squares * (gain + 1)).sum(1) / (8 * positions)
    torch.testing.assert_close(energy[:, 0], own_share)
    correlation = (grad * decoded).sum((0, 2, 3)) / count
    through = (gain * correlation.square()).sum() / 8 + (squares * gain).sum(1) / (8 * positions * count)
    total = expected(own, decoded)[0].square().sum()
    # The kernel's total follows from sums over float32 codes, of which its projections are taken off.
    torch.testing.assert_close(energy[:, 1], (through / total).float(), rtol=5e-4, atol=0)
    assert ops.batch_norm_backward(*arguments(x, energy=False)[0])[3].numel() == 0


def test_opcheck():
    for layout in LAYOUTS.values():
        opcheck(ops.batch_norm_backward, arguments(layout(torch.randn(2, 3, 4, 5)))[0])


def test_nothing_but_the_result_is_allocated():
    # The point of the kernel: no decoded input. PyTorch's profiler sees every allocation.
    own, _ = arguments(torch.randn(8, 16, 32, 32), energy=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = ops.batch_norm_backward(*own)
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert taken < 1.1 * result[0].nbytes


def test_bad_arguments_are_named():
    own = list(arguments(torch.randn(2, 3, 4, 5))[0])
    with pytest.raises(TypeError, match="batch_norm_backward: grad must be float32, float16 or bfloat16; got Double"):
        ops.batch_norm_backward(own[0].double(), *own[1:])
    with pytest.raises(ValueError, match=r"batch_norm_backward: grad must have the shape \[2, 3, 4, 5\]; got \[2, 3, 4\]"):
        ops.batch_norm_backward(own[0][..., 0], *own[1:])
    with pytest.raises(ValueError, match="batch_norm_backward: ranges must have 4 elements; got"):
        ops.batch_norm_backward(*own[:2], own[2][:0], *own[3:])
    for stride in ([1296, 81, 3, 1], [60, 20, 5], [60, 1, 20, 4], [60, 20, 5, 0]):
        with pytest.raises(
            ValueError, match=r"batch_norm_backward: stride must be dense with samples outermost; got .* for \[2, 3, 4, 5\]"
        ):
            ops.batch_norm_backward(*own[:7], stride, *own[8:])
    for place, name in ((9, "weight"), (10, "inverse_std")):
        with pytest.raises(ValueError, match=rf"batch_norm_backward: {name} must have 3 elements; got \[0\]"):
            ops.batch_norm_backward(*own[:place], torch.empty(0), *own[place + 1 :])
