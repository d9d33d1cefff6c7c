"""Ternary weights times 8-bit inputs: exact where 16-bit sums are fullest, and where they are emptied within a tap or across taps."""

import pytest
import torch
import torch.nn.functional as F

from quantize.packed.layout import levels_table, pack, to_rows
from quantize.packed.panels import integers, panels, sums

ops = torch.ops.quantize
ONE = torch.tensor(1.0)


def arguments_of(levels, zero_point):
    """packed_linear's, and packed_conv2d's up to the geometry, after x: one step is one."""
    rows = to_rows(levels)
    codes, channels = pack(rows, "ternary", 2), levels.shape[1]
    made = panels(codes, 2, rows.shape[1] // channels, channels, 1)
    total = sums(integers(codes, "ternary", 2, rows.shape[1]), rows.shape[1])
    return (ONE, torch.tensor(float(zero_point)), 8, codes, made, levels_table("ternary", 2), torch.ones(len(levels)), total, None, 2)


@pytest.mark.parametrize(("weight", "value", "zero_point", "want"), [(1, 127, 0, 585_216), (-1, -128, 128, 589_824)])
def test_extremes(each_isa, weight, value, zero_point, want):
    for rows in (1, 2, 13):
        x, levels = torch.full((rows, 4608), float(value)), torch.full((20, 4608), float(weight))
        assert torch.equal(ops.packed_linear(x, *arguments_of(levels, zero_point)), torch.full((rows, 20), float(want)))
    x, levels = torch.full((1, 512, 5, 4), float(value)), torch.full((20, 512, 3, 3), float(weight))
    geometry = ([3, 3], [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(ops.packed_conv2d(x, *arguments_of(levels, zero_point), *geometry), torch.full((1, 20, 3, 2), float(want)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("inputs", [256, 257, 260, 4096])  # 64 quads fill a 16-bit sum
def test_full_codes_do_not_saturate(each_isa, inputs, sign):
    levels = torch.full((17, inputs), float(sign))
    for rows in (1, 5):
        out = ops.packed_linear(torch.full((rows, inputs), 1e9), *arguments_of(levels, 0))
        assert torch.equal(out, torch.full((rows, 17), 255.0 * inputs * sign))


@pytest.mark.parametrize("channels", [4, 20, 72, 300])  # taps of 1, 5, 18 and 75 quads
def test_any_taps(each_isa, channels):
    x, levels = torch.randint(-100, 156, (2, channels, 6, 5)).float(), torch.randint(-1, 2, (33, channels, 3, 3)).float()
    out = ops.packed_conv2d(x, *arguments_of(levels, 100), [3, 3], [1, 1], [1, 1], [1, 1], 1)
    assert torch.equal(out, F.conv2d(x.double(), levels.double(), padding=1).float())
