"""Where a sign changes: batch norms, and whole layers, in front of a sign as one comparison a channel.

What stands before the sign is monotone in its input, so that a bisection over the floats, or the whole numbers, finds the first one on the
other side as the arithmetic itself would: no formula has to guess how it rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Threshold = tuple[Tensor, Tensor]  # threshold, flip uint8: a bit is (x < threshold) ^ flip
HALF = 0.5  # DoReFa's 1-bit activations round a half down


def _bisect(above: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """For each entry the first whole number from `low` to `high` for which `above` holds, if it does for `high`; int64."""
    while bool((low < high).any()):
        middle = (low + high) // 2  # towards minus infinity
        found = above(middle)
        low, high = torch.where(found | (low >= high), low, middle + 1), torch.where(found & (low < high), middle, high)
    return high


def _float(order: Tensor) -> Tensor:
    """Floats in their order: 0 is +0.0, 1 the smallest positive one, -1 the smallest negative one."""
    bits = torch.where(order < 0, (order.abs() | 1 << 31) - (1 << 32), order)
    return bits.to(torch.int32).view(torch.float32)


_INFINITY = 0x7F800000  # in that order


def of_affine(scale: Tensor, shift: Tensor, kind: str, relu: bool = False) -> Threshold:
    """The bits of float32(x * scale + shift), float32[channels] each: below zero ("sign"), or above a half ("unit").

    With `relu`, of max(x, 0) in the place of x.
    """
    scale, shift = scale.double(), shift.double()

    def bit(x: Tensor) -> Tensor:
        y = (x.double() * scale + shift).float()
        return y < 0 if kind == "sign" else y > HALF

    ends = torch.full_like(scale, _INFINITY - 1, dtype=torch.int64)
    last = bit(_float(ends))
    order = _bisect(lambda middle: bit(_float(middle)) == last, -ends, ends)
    threshold = torch.where(order == -ends, -torch.inf, _float(order))
    if relu:  # negative numbers are zeros
        threshold = torch.where(threshold <= 0, -torch.inf, threshold)
    return threshold, last.to(torch.uint8)


def of_products(scales: Tensor, bias: Tensor | None, threshold: Tensor, flip: Tensor, most: int) -> Threshold:
    """The bits of float32(dot * scales) + bias under the next layer's thresholds, float32 and uint8[channels]; |dot| <= most.

    Returns:
        int32 threshold and uint8 flip, for dot itself.
    """
    shift = torch.zeros_like(scales) if bias is None else bias

    def bit(dot: Tensor) -> Tensor:
        return (dot.float() * scales + shift < threshold) ^ flip.bool()

    ends = torch.full_like(scales, most, dtype=torch.int64)
    last = bit(ends)
    return _bisect(lambda middle: bit(middle) == last, -ends, ends).to(torch.int32), last.to(torch.uint8)
