"""Powers of two as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import PowerOfTwo
from .quantizer import check_floats, on_floats


def power_of_two(x: Tensor, bits: int | None = None, plus: bool = False) -> Tensor:
    """Rounds to powers of two: PO2, ``sign(x) 2^round(log2|x|)``, or PO2+, the same of ``sqrt(8/9)|x|``: the nearest power of two.

    Decided in integer arithmetic on the float's bits. Ties of PO2+ go downward (1.5 to 1, -3 to -2); PO2 has none. Zero, infinities and
    NaN stay; what would leave the format becomes its largest power of two. The gradient goes straight through.

    Args:
        x: floating-point Tensor of any shape.
        bits: None rounds every element by itself. 2 to 8: the levels are 0 and ``+-scale * 2^e``, e = 0 .. 2^(bits-1) - 2, with a
            least-squares scale for each entry of dimension 0 (for the whole of a vector), as :class:`quantize.PowerOfTwo` does it; the
            gradient stops beyond the largest level. float64 is rounded in float32.
        plus: PO2+.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: x is no floating-point tensor, or bits no integer.
        ValueError: bits out of range.

    Example:
        >>> quantize.power_of_two(torch.tensor([0.75, 1.42, 1.5, 1.51, -3.0]), plus=True)
        tensor([ 0.5000,  1.0000,  1.0000,  2.0000, -2.0000])
        >>> quantize.power_of_two(torch.tensor([0.75, 1.42, 1.5, 1.51, -3.0]))
        tensor([ 1.,  2.,  2.,  2., -4.])
    """
    check_floats("power_of_two", "x", x)
    if not isinstance(plus, bool):
        raise TypeError(f"power_of_two: plus must be a bool; got {plus!r}")
    if bits is None:
        return torch.ops.quantize.power_of_two(x, plus)
    config = PowerOfTwo(bits, plus)
    rows = x if x.dim() > 1 else x.reshape(1, -1)
    return on_floats("power_of_two", "x", rows, lambda w: torch.ops.quantize.fake_quantize(w, config.codebook, bits, True)).view_as(x)
