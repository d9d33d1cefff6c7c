"""Binary weights with a scale for each filter, and activations that are signs (XNOR-Net)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import XNOR
from .quantizer import WeightQuantizer, on_floats


def binary(w: Tensor) -> Tensor:
    """``sign(c) * mean|c|``, c the weights centred and clamped to [-1, 1] (XNOR-Net, arXiv 1603.05279, section 3.1); sign(0) = +1.

    Centred: less the mean over dimension 1, the input channels, at each tap (nothing is centred where that dimension has size 1, or in a
    vector). The mean magnitude is of each entry of dimension 0 (of the whole of a vector).

    The gradient is that formula's with d sign(c) / dc = 1: with g = dL/dy and n weights in a filter ``g mean|c| + sign(c) sum(g sign(c)) /
    n`` where the centred weight is within [-1, 1], 0 beyond, less its mean over dimension 1. The paper's ``1/n + mean|c| dsign/dw`` leaves
    out what a weight does to the others of its filter through their scale. A NaN or an infinity makes its entry NaN.

    Args:
        w: Tensor of any shape and floating-point type; float64 is computed in float32.

    Returns:
        Tensor of w's shape and dtype.

    Raises:
        TypeError: w is no such tensor.

    Example:
        >>> quantize.binary(torch.tensor([[0.9, 0.1, -0.4, -0.2]]))
        tensor([[ 0.4000,  0.4000, -0.4000, -0.4000]])
    """
    return on_floats("binary", "w", w, lambda w: torch.ops.quantize.binarize(w, 1.0, False, 1.0))


class BinaryQuantizer(WeightQuantizer):
    """What :class:`quantize.XNOR` makes of a weight."""

    config: XNOR

    def _clamp(self) -> tuple[float, bool]:
        """The ops' `share` and `relative`: ReCU's is the quantile of a Laplace distribution of mean magnitude 1."""
        tau = self.config.rectify
        if tau is None:
            return 1.0, False
        return (-math.log(2 - 2 * tau) if tau < 1 else math.inf), True

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight: shape and dtype as given."""
        rows = weight.movedim(self.axis, 0) if self.axis else weight
        factor = 1.0
        if self.config.reference_gradient:
            channels, n = rows.shape[1] if rows.dim() > 1 else 1, rows.numel() // max(len(rows), 1)
            factor = n * (1 - 1 / channels) if channels > 1 else float(n)
        quantized = torch.ops.quantize.binarize(rows, *self._clamp(), factor)
        return quantized.movedim(0, self.axis) if self.axis else quantized

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As WeightQuantizer's; levels of -1 and 1."""
        rows = weight.detach().float().movedim(self.axis, 0)
        quantized, scale, _, _ = torch.ops.quantize.binary_quantize(rows, *self._clamp())
        return torch.where(quantized < 0, -1.0, 1.0), scale


class SignQuantizer(nn.Module):
    """``x >= 0 ? 1 : -1`` for the input of a layer with binary weights; 0.0 and -0.0 give 1, NaN stays.

    The gradient passes where |x| <= 1 (``"clip"``; XNOR-Net), of which a bit an element is kept, or is multiplied by 2 - 2|x| on |x| < 1
    (``"polynomial"``; Bi-Real Net, arXiv 1808.00278), which is kept in 4 bits an element: the nearest of 0, 2/15, ..., 2.
    """

    bits, kind, initialized = 1, "sign", True

    def __init__(self, gradient: str = "clip"):
        super().__init__()
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        """The signs: shape and dtype as given."""
        return torch.ops.quantize.sign_activation(x, self.gradient == "polynomial")

    def extra_repr(self) -> str:
        """How the gradient passes."""
        return f"gradient={self.gradient!r}"
