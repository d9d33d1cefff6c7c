"""Weights as the integer kernels read them (csrc/packed/gemm_kernels.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import _split, levels_table, storage_bits

COLUMNS, QUAD = 16, 4  # output channels of a panel, input channels that lie together


def panels(codes: Tensor, width: int, taps: int, channels: int, groups: int) -> Tensor:
    """Rows uint8[N, row_bytes] of `taps` x `channels` codes to panels uint8[groups, tiles, bytes].

    A panel has 16 output channels; channels of a tap are filled up to a multiple of 4, with the code 0 as everything that is filled up.
    """
    split = _split(codes, width)[:, : taps * channels].view(groups, len(codes) // groups, taps, channels)
    split = F.pad(split, (0, -channels % QUAD, 0, 0, 0, -split.shape[1] % COLUMNS))
    quads = split.view(groups, -1, COLUMNS, split.shape[2] * split.shape[3] // QUAD, QUAD).transpose(2, 3)  # [G, tiles, quads, 16, 4]
    share = 8 // width
    quads = F.pad(quads, (0, 0, 0, 0, 0, -quads.shape[2] % share)).flatten(3)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(share, 1)
    return (quads.unflatten(2, (-1, share)) << shifts).sum(3, dtype=torch.uint8).flatten(2).contiguous()


def sums(codes: Tensor, method: str, bits: int, k: int) -> Tensor:
    """int32[N]: the sum of each output channel's levels, which an input's zero point is multiplied by."""
    width = storage_bits(bits)
    table = levels_table(method, width).nan_to_num(nan=0.0).to(codes.device)
    return table[_split(codes, width)[:, :k].int()].sum(1).to(torch.int32)
