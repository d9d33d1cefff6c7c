"""pack_pool_indices and its inverse, on the indices that PyTorch's max pools return."""

import pytest
import torch
import torch.nn.functional as F

ops = torch.ops.quantize

POOLS = [  # input, kernel, stride, padding, dilation, ceil_mode
    ((2, 3, 8, 8), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((2, 3, 9, 7), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 3, 9, 7), (3, 3), (2, 2), (1, 1), (1, 1), True),
    ((1, 2, 13, 11), (3, 2), (1, 3), (1, 1), (2, 3), True),
    ((1, 1, 40, 40), (16, 16), (5, 7), (8, 8), (1, 1), False),
    ((2, 2, 1, 50), (1, 5), (1, 2), (0, 2), (1, 4), True),
    ((1, 2, 5, 6, 7), (2, 3, 2), (2, 1, 2), (1, 1, 0), (1, 2, 1), True),
    ((1, 1, 9, 8, 8), (6, 6, 7), (1, 1, 1), (3, 3, 3), (1, 1, 1), False),
    ((3, 4, 4), (2, 2), (2, 2), (0, 0), (1, 1), False),
]


@pytest.mark.parametrize("case", POOLS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "all -inf", "NaN here and there", "constant"])
def test_round_trip(case, kind):
    size, kernel, stride, padding, dilation, ceil_mode = case
    x = torch.randn(size)
    if kind == "all -inf":
        x.fill_(-torch.inf)
    elif kind == "NaN here and there":
        x[torch.rand(size) < 0.1] = torch.nan
    elif kind == "constant":
        x.fill_(1.0)
    n = len(kernel)
    pool = F.max_pool2d if n == 2 else F.max_pool3d
    _, indices = pool(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    window = (x.shape[-n:], kernel, stride, padding, dilation)
    offsets = ops.pack_pool_indices(indices, *window)
    assert offsets.dtype == torch.uint8
    assert torch.equal(ops.unpack_pool_indices(offsets, *window), indices)


@pytest.mark.parametrize(
    ("op", "x", "kernel", "error", "message"),
    [
        ("pack_pool_indices", torch.zeros(1, 1, 2, 2), [2, 2], TypeError, "pack_pool_indices: indices must be Long"),
        ("unpack_pool_indices", torch.zeros(1, 1, 2, 2), [2, 2], TypeError, "unpack_pool_indices: offsets must be Byte"),
        ("pack_pool_indices", torch.zeros(1, 1, 2, 2).long(), [17, 16], ValueError, r"kernel must have at most 256 positions.*\[17, 16\]"),
        ("pack_pool_indices", torch.zeros(2).long(), [2, 2], ValueError, "input_size must give 1 to 3 spatial sizes"),
        (
            "pack_pool_indices",
            torch.zeros(1, 1, 2, 2).long(),
            [2],
            ValueError,
            "kernel, stride, padding and dilation must each have 2 numbers",
        ),
    ],
)
def test_bad_input_is_named(op, x, kernel, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, op)(x, [4, 4], kernel, [2, 2], [0, 0], [1, 1])


@pytest.mark.parametrize("op", [ops.pack_pool_indices, ops.unpack_pool_indices], ids=lambda op: op.__name__)
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("bad", [0, -1])
def test_windows_are_positive(op, place, bad):
    x = torch.zeros(1, 1, 2, 2, dtype=torch.int64 if op is ops.pack_pool_indices else torch.uint8)
    window = [[4, 4], [2, 2], [2, 2], [0, 0], [1, 1]]
    window[place][1] = bad
    if (place, bad) == (3, 0):
        assert op(x, *window).shape == x.shape
        return
    with pytest.raises(ValueError, match="input_size, kernel, stride and dilation must be positive and padding not negative; got"):
        op(x, *window)


def test_a_kernel_whose_positions_overflow():
    with pytest.raises(ValueError, match="kernel must have at most 256 positions"):
        ops.pack_pool_indices(torch.zeros(1, 1, 2, 2).long(), [4, 4], [2**62, 4], [2, 2], [0, 0], [1, 1])
