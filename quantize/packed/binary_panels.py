"""Weights of one bit as the binary kernels read them (csrc/packed/binary_kernels.h): a set bit is -1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import split

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


def plane_panels(codes: Tensor, bits: int, length: int, groups: int = 1) -> Tensor:
    """Rows of `length` odd levels of 1 or 2 bits (layout.py) to the panels of their planes, uint8[bits, groups, ...].

    The planes' signs, weighted by 1 and 2, add up to the level: of two bits, 2c + 1 = 2 * (1 - 2 * c1) + (2 * c0 - 1).
    """
    if bits == 1:
        return binary_panels(codes, length, groups)[None]
    fields = split(codes, 2)[:, :length].to(torch.int8)
    planes = (2 * (fields & 1) - 1, 1 - (fields & 2))
    return torch.stack([binary_panels(binary_codes(plane), length, groups) for plane in planes])


def tap_sums(codes: Tensor, taps: int, channels: int) -> Tensor:
    """int32[taps, N]: the sum of each tap's weights, `channels` of them."""
    ones = _bits(codes, taps * channels).unflatten(1, (taps, channels)).sum(2, dtype=torch.int32)
    return (channels - 2 * ones).t().contiguous()
