"""What autocast makes of a call's tensors: made before packing, so that what is kept is what is used."""

from __future__ import annotations

import torch
from torch import Tensor


def _is_on(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # there is no autocast of meta tensors


def cast_for_weight(input: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """`input` as autocast makes it for a convolution or a linear layer. And the dtype that `weight` will have: the op casts it, through
    autocast's cache (csrc/layers/autocast.h)."""
    kind = input.device.type
    if not _is_on(kind):
        return input, weight.dtype
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), dtype if weight.is_floating_point() and weight.dtype != torch.float64 else weight.dtype


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a call that autocast makes in its own, lower, precision."""
    kind = tensors[0].device.type
    if not _is_on(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def raised(op: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a call of aten's `op`, in float32 where autocast computes it in that: on CUDA, but not on CPUs."""
    kind = tensors[0].device.type
    if not _is_on(kind) or not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", f"Autocast{kind.upper()}"):
        return tensors
    return tuple(t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.float() for t in tensors)
