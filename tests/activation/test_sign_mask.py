"""clip_mask, clip_mask_, pack_mask and apply_mask against PyTorch's own derivatives, for every ISA."""

import pytest
import torch
import torch.nn.functional as F

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 7, 8, 9, 31, 63, 64, 65, 129, 151, 257, 1000, 40000]
INF, NAN = float("inf"), float("nan")
RELU = (0.0, NAN, 0.0)
KINDS = {  # (low, high, negative_slope) and the function they stand for
    "relu": (RELU, F.relu),
    "relu6": ((0.0, 6.0, 0.0), F.relu6),
    "leaky_relu": ((0.0, NAN, 0.01), lambda x: F.leaky_relu(x, 0.01)),
    "hardtanh": ((-0.299, 0.7, 0.0), lambda x: F.hardtanh(x, -0.299, 0.7)),  # ends that 16-bit types do not hold
    "one end": ((-INF, 0.7, 0.0), lambda x: F.hardtanh(x, -INF, 0.7)),
    "the other": ((-0.7, INF, 0.0), lambda x: F.hardtanh(x, -0.7, INF)),
}


def bits_of(mask):
    """Booleans to bytes, bit i of byte i/8 for element i."""
    flat = F.pad(mask.flatten().long(), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8)).sum(1).to(torch.uint8)


def awkward(n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 5
    special = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 6.0, 0.7, -0.7, -0.299, 1e-45, -1e-45, 65504.0, 5.99, 6.01, -1e-20]
    for place, value in zip(range(3, n, 5), special, strict=False):
        x[place] = value
    return x.to(dtype)


def same(a, b):
    return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_clips(each_isa, kind, dtype):
    arguments, plain = KINDS[kind]
    for n in SIZES:
        x = awkward(n, dtype)
        y, mask = ops.clip_mask(x, *arguments)
        assert same(y, plain(x)), n
        # Derivative 1 is the bit; NaN passes its gradient on, as threshold_backward does.
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(plain(leaf), leaf, torch.ones_like(x)) if n else (x,)
        passes = (grad == 1) | x.isnan()
        assert torch.equal(mask, bits_of(passes)), n
        into = x.clone()
        assert torch.equal(ops.clip_mask_(into, *arguments), mask)
        assert same(into, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("on", "off"), [(1.0, 0.0), (1.0, 0.01), (1.25, 0.0), (0.0, 0.0)])
def test_apply_mask(each_isa, on, off, dtype):
    for n in SIZES:
        mask = torch.rand(n) < 0.5
        grad = torch.randn(n).to(dtype)
        packed = ops.pack_mask(mask)
        assert torch.equal(packed, bits_of(mask)), n
        factor = torch.where(mask, on, off)
        assert same(ops.apply_mask(grad, packed, on, off), (grad.float() * factor).to(dtype)), n


def test_a_masked_gradient_is_zero_whatever_it_was(each_isa):
    grad = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0] * 10)
    assert (ops.apply_mask(grad, torch.zeros(5, dtype=torch.uint8), 1.0, 0.0) == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 4, 5, 6).permute(0, 3, 1, 2),
        lambda: torch.randn(40, 30).t(),
        lambda: torch.randn(3, 300)[:, ::2],
        lambda: torch.randn(3, 1).expand(3, 70),
        lambda: torch.randn(()),
    ],
    ids=["channels_last", "permuted", "transposed", "every other", "expanded", "no dimension"],
)
def test_memory_formats(each_isa, make):
    x = make()
    y, mask = ops.clip_mask(x, *RELU)
    assert torch.equal(y, x.relu())
    assert torch.equal(ops.apply_mask(torch.ones_like(y).as_strided(y.shape, y.stride()), mask, 1.0, 0.0), (x > 0).float())


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        (
            "clip_mask",
            (torch.ones(4, dtype=torch.int32), *RELU),
            TypeError,
            "clip_mask: x must be float32, float16 or bfloat16; got Int",
        ),
        ("clip_mask_", (torch.ones(6, 4).t(), *RELU), ValueError, "clip_mask_: x must be dense in memory"),
        ("pack_mask", (torch.ones(4),), TypeError, "pack_mask: mask must be Bool"),
        ("apply_mask", (torch.ones(9), torch.zeros(1, dtype=torch.uint8), 1.0, 0.0), ValueError, "apply_mask: mask must have 2 elements"),
        ("apply_mask", (torch.ones(9), torch.zeros(2), 1.0, 0.0), TypeError, "apply_mask: mask must be Byte"),
        (
            "apply_mask",
            (torch.ones(9).double(), torch.zeros(2, dtype=torch.uint8), 1.0, 0.0),
            TypeError,
            "apply_mask: grad must be float32",
        ),
    ],
)
def test_bad_input_is_named(op, arguments, error, message, on_device):
    with pytest.raises(error, match=message):
        getattr(ops, op)(*on_device(arguments))


def test_masks_with_gaps_in_memory():
    mask = torch.randint(256, (20,), dtype=torch.uint8)
    grad = torch.randn(160)
    assert torch.equal(ops.apply_mask(grad, mask.repeat_interleave(2)[::2], 1.0, 0.0), ops.apply_mask(grad, mask, 1.0, 0.0))
