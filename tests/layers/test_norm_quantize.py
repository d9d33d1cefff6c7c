"""norm_quantize, norm_quantize_mixed, norm_variance: group_quantize and the others of what a batch norm makes of its input."""

import pytest
import torch
from same_bits import assert_isas_agree
from torch.library import opcheck

ops = torch.ops.quantize
SEED = torch.tensor([3, 4])
# The last two: groups of a sample that are longer than a thread takes, and rows of more columns than a piece has groups.
SHAPES = [(4, 5, 6, 7), (3, 16, 8, 8), (5, 3, 40), (6, 20), (2, 3, 3, 4, 8), (1, 3, 1, 1), (2, 3, 200, 301), (2, 1030, 5, 1)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "channels between": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x,  # goes by PyTorch
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def arguments(shape, layout="contiguous", dtype=torch.float32):
    """An input whose channels differ a thousandfold, mean and inverse deviation."""
    deviation = torch.logspace(-1.5, 1.5, shape[1])
    x = torch.randn(shape) * deviation.view(1, -1, *[1] * (len(shape) - 2))
    return LAYOUTS[layout](x.to(dtype)), torch.randn(shape[1]), 1 / deviation


def normalized(x, mean, inverse_std):
    """In the order that x is packed in."""
    along = (1, -1, *[1] * (x.dim() - 2))
    y = ((x.float() - mean.view(along)) * inverse_std.view(along)).to(x.dtype)
    return torch.empty_like(x).copy_(y) if x.is_contiguous() or not x.numel() else y


def both(own, group_size):
    """What the three ops make of an input, and what group_quantize and the others make of the normalized one."""
    x, *statistics = own
    bits = (torch.arange(x.shape[0]) % 4).exp2().to(torch.uint8)
    y = normalized(*own)
    got = [*ops.norm_quantize(x, *statistics, 2, group_size, SEED), ops.norm_variance(x, *statistics, group_size)]
    want = [*ops.group_quantize(y, 2, group_size, SEED), ops.group_variance(y, group_size)]
    if group_size != -1:  # decoded: the codes may end in bytes that mean nothing
        layout = (bits, 0, group_size, y.shape, y.stride(), y.dtype, SEED)
        packed = ops.norm_quantize_mixed(x, *statistics, bits, int(bits.sum()), group_size, SEED)
        got += [packed[1], ops.group_dequantize(*packed, *layout)]
        packed = ops.group_quantize_mixed(y, bits, int(bits.sum()), group_size, SEED)
        want += [packed[1], ops.group_dequantize(*packed, *layout)]
    return got, want


@pytest.mark.parametrize("group_size", [256, 100, 7, 0, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_packing_of_the_normalized_input(shape, layout, group_size, each_isa):
    for dtype in DTYPES:
        for a, b in zip(*both(arguments(shape, layout, dtype), group_size), strict=True):
            assert torch.equal(a, b), dtype


def test_every_isa_and_any_threads_give_the_same_bits():
    own = arguments((9, 24, 33, 31), "channels last")

    def run():
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(own, 64)[0])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        return found[0]

    before = torch.get_num_threads()
    try:
        assert_isas_agree(run)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(value):
    x, mean, inverse_std = arguments((2, 4, 8, 8))
    x[1, 2, 3, 4] = value
    codes, ranges = ops.norm_quantize(x, mean, inverse_std, 8, 64, SEED)
    y = ops.group_dequantize(codes, ranges, None, 8, 64, x.shape, x.stride(), x.dtype, SEED)
    assert y[1, 2].isnan().any() and y.isfinite().sum() == x.numel() - 64


@pytest.mark.parametrize("shape", [(0, 5, 6, 7), (4, 0, 6, 7), (4, 5, 0, 7)], ids=str)
def test_nothing_to_pack(shape):
    own = torch.randn(shape), torch.zeros(shape[1]), torch.ones(shape[1])
    for a, b in zip(*both(own, 256), strict=True):
        assert a.shape == b.shape


@pytest.mark.parametrize("shape", [(4, 8, 6, 4), (6, 24)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_shapes(shape, layout):
    x, mean, inverse_std = arguments(shape, layout)
    bits = torch.ones(shape[0], dtype=torch.uint8)
    for op, rest in (
        (ops.norm_quantize, (2, 64, SEED)),
        (ops.norm_quantize_mixed, (bits, shape[0], 64, SEED)),
        (ops.norm_variance, (64,)),
    ):
        own = (x, mean, inverse_std, *rest)
        opcheck(op.default, own)
        real, meta = op(*own), op(*[a.to("meta") if torch.is_tensor(a) else a for a in own])
        for r, m in zip(*[(t,) if torch.is_tensor(t) else t for t in (real, meta)], strict=True):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape, layout):
    """The codes' bits too: the subtraction and the product are rounded alike."""
    own = arguments(shape, layout)
    on_gpu = [t.cuda() for t in own]
    want = ops.norm_quantize(*own, 2, 64, SEED)
    for a, b in zip(ops.norm_quantize(*on_gpu, 2, 64, SEED), want, strict=True):
        assert torch.equal(a.cpu(), b)
    torch.testing.assert_close(ops.norm_variance(*on_gpu, 64).cpu(), ops.norm_variance(*own, 64), rtol=1e-5, atol=1e-6)


def test_errors():
    x, mean, inverse_std = arguments((4, 5, 6, 7))
    rest = (2, 64, SEED)
    for own, message in (
        ((torch.randn(5), mean, inverse_std), r"norm_quantize: x must be \[N, C, ...\]; got \[5\]"),
        ((x, mean[:4], inverse_std), r"norm_quantize: mean must have 5 elements; got \[4\]"),
        ((x, mean, torch.ones(6)), r"norm_quantize: inverse_std must have 5 elements; got \[6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.norm_quantize(*own, *rest)
    with pytest.raises(TypeError, match="norm_quantize: mean must be Float; got Double|norm_quantize: mean must be float32"):
        ops.norm_quantize(x, mean.double(), inverse_std, *rest)
    with pytest.raises(TypeError, match="norm_quantize: x must be float32, float16 or bfloat16; got Double"):
        ops.norm_quantize(x.double(), mean, inverse_std, *rest)
    with pytest.raises(ValueError, match="norm_quantize: bits must be 1, 2, 4 or 8; got 3"):
        ops.norm_quantize(x, mean, inverse_std, 3, 64, SEED)
