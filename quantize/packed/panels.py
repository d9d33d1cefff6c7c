"""Weights as the integer kernels read them (csrc/packed/gemm_kernels.h)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import join, levels_table, split, storage_bits

COLUMNS, QUAD = 16, 4  # output channels of a panel, input channels that lie together


class Integers(NamedTuple):
    """A weight as whole numbers within +-127: rows of `codes` of `width` (2, 4, 8) bits, and the level of each code.

    `ones`: levels are codes + 1/2, of twice the scale, and a row of ones behind the others sums the inputs up for that half.
    """

    codes: Tensor
    width: int
    levels: Tensor
    ones: bool = False


def integers(codes: Tensor, method: str, bits: int, k: int) -> Integers:
    """`codes`: rows of `k` codes as files have them (layout.py); bits: 8 at most, of powers of two 4."""
    width = storage_bits(bits)
    if width == 1:  # two's complement: as many bits more as one likes
        return Integers(join(split(codes, 1)[:, :k] * 3, 2), 2, levels_table(method, 2).to(codes.device))
    if method != "dorefa" or width < 8:
        return Integers(codes, width, levels_table(method, width, bits).to(codes.device))
    table = levels_table("uniform", 8).to(codes.device)
    if bits < 8:  # odd numbers are bytes themselves, which the kernels take as they are
        return Integers(join(split(codes, 8)[:, :k] * 2 + 1, 8), 8, table)
    ones = join(codes.new_ones(1, k), 8)
    return Integers(torch.cat([codes, ones]), 8, table, ones=True)


def panels(codes: Tensor, width: int, taps: int, channels: int, groups: int) -> Tensor:
    """Rows uint8[N, row_bytes] of `taps` x `channels` codes to panels uint8[groups, tiles, bytes].

    A panel has 16 output channels; channels of a tap are filled up to a multiple of 4, with the code 0 as everything that is filled up.
    """
    fields = split(codes, width)[:, : taps * channels].view(groups, len(codes) // groups, taps, channels)
    fields = F.pad(fields, (0, -channels % QUAD, 0, 0, 0, -fields.shape[1] % COLUMNS))
    quads = fields.view(groups, -1, COLUMNS, fields.shape[2] * fields.shape[3] // QUAD, QUAD).transpose(2, 3)  # [G, tiles, quads, 16, 4]
    share = 8 // width
    quads = F.pad(quads, (0, 0, 0, 0, 0, -quads.shape[2] % share)).flatten(3)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(share, 1)
    return (quads.unflatten(2, (-1, share)) << shifts).sum(3, dtype=torch.uint8).flatten(2).contiguous()


def tap_levels(weight: Integers, taps: int, channels: int) -> Tensor:
    """float32[N / channels, taps, channels filled up to sixteens]: levels of output channels that read one input channel each."""
    levels = weight.levels.nan_to_num(nan=0.0)[split(weight.codes, weight.width)[:, :taps].int()]
    return F.pad(levels.view(channels, -1, taps).permute(1, 2, 0), (0, -channels % COLUMNS)).contiguous()


def sums(weight: Integers, k: int) -> Tensor:
    """int32[N]: the sum of each output channel's levels, which an input's zero point is multiplied by."""
    return weight.levels.nan_to_num(nan=0.0)[split(weight.codes, weight.width)[:, :k].int()].sum(1).to(torch.int32)
