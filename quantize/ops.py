"""The ops of layers that train, called the short way where nobody wants to see the calls."""

from __future__ import annotations

import torch

from . import _C


def ops_for(*tensors: torch.Tensor | None):
    """What has the ops as attributes, for a call with `tensors`, its arguments by position: ``torch.ops.quantize``, which takes as long
    for its arguments as a small layer to compute, only where torch.compile or an override of ``__torch_function__`` is to see the call."""
    if torch.compiler.is_compiling() or torch._C._has_torch_function_variadic(*tensors):
        return torch.ops.quantize
    return _C.direct
