"""Ternary weights as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizer import on_floats


def ternary(w: Tensor) -> Tensor:
    """``alpha * {-1, 0, 1}``: 0 where ``|w| <= 0.7 mean|w|``, alpha the mean magnitude of the rest (TWN, arXiv 1605.04711).

    The means are of each entry of dimension 0 (of the whole of a vector), as :class:`quantize.Ternary` takes them. The gradient goes
    straight through. A NaN or an infinity makes its entry NaN.

    Args:
        w: Tensor of any shape and floating-point type; float64 is computed in float32.

    Returns:
        Tensor of w's shape and dtype.

    Raises:
        TypeError: w is no such tensor.

    Example:
        >>> quantize.ternary(torch.tensor([0.8, 0.4, -0.6, 0.1]))
        tensor([ 0.6000,  0.6000, -0.6000,  0.0000])
    """

    def quantized(w: Tensor) -> Tensor:
        rows = w if w.dim() > 1 else w.reshape(1, -1)
        return torch.ops.quantize.fake_quantize(rows, "ternary", 2, False).view_as(w)

    return on_floats("ternary", "w", w, quantized)
