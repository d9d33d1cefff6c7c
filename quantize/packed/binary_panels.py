"""Weights of one bit as the binary kernels read them (csrc/packed/binary_kernels.h): a set bit is -1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUAD = 4  # bits of a nibble, and output channels of a panel


def _bits(codes: Tensor, length: int) -> Tensor:
    """uint8[N, length] of 0 and 1."""
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != -(-length // 64) * 8:
        raise ValueError(f"codes must be uint8 [N, {-(-length // 64) * 8}]; got {str(codes.dtype)[6:]} {list(codes.shape)}")
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :length]


def binary_codes(signs: Tensor) -> Tensor:
    """Signs Tensor[N, K] (below zero: -1; any dtype) to rows uint8[N, 8 * ceil(K / 64)]: weight k is bit k % 8 of byte k // 8."""
    bits = F.pad((signs < 0).to(torch.uint8), (0, -signs.shape[1] % 64))
    return (bits.unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=signs.device)).sum(-1, dtype=torch.uint8)


def binary_panels(codes: Tensor, length: int, groups: int = 1) -> Tensor:
    """Rows of `length` bits to uint8[groups, ceil(N / groups / 4), ceil(length / 4), 4]: nibbles, shifted up by four.

    Four output channels of a group lie together; channels and bits that are filled up are zero.
    """
    bits = F.pad(_bits(codes, length), (0, -length % QUAD)).unflatten(1, (-1, QUAD))
    nibbles = (bits << torch.arange(4, 8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)  # [N, quads]
    nibbles = nibbles.unflatten(0, (groups, len(codes) // groups))
    return F.pad(nibbles, (0, 0, 0, -nibbles.shape[1] % QUAD)).unflatten(1, (-1, QUAD)).transpose(2, 3).contiguous()


def tap_sums(codes: Tensor, taps: int, channels: int) -> Tensor:
    """int32[taps, N]: the sum of each tap's weights, `channels` of them."""
    ones = _bits(codes, taps * channels).unflatten(1, (taps, channels)).sum(2, dtype=torch.int32)
    return (channels - 2 * ones).t().contiguous()
