"""DoReFa: weights by a tanh and its largest value, activations in [0, 1], gradients rounded at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import check_integer
from ..hooks import remove_hooks
from ..seed import draw_seed
from .config import DoReFa
from .quantizer import WeightQuantizer, on_floats


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """``(2i - L) / L`` with L = 2^bits - 1 and ``i = round(L (tanh(w) / 2m + 1/2))``, m the largest ``|tanh(w)|``.

    DoReFa, arXiv 1606.06160, section 2.3. With 1 bit ``sign(w) * mean|w|``, sign(0) = +1. The gradient goes straight
    through the rounding and is exact through tanh and the largest value, which equally large weights share; with 1 bit it goes straight
    through everything. A NaN or an infinity makes everything NaN; zeros divide by nothing.

    Args:
        w: Tensor of any shape and floating-point type; float64 is computed in float32.
        bits: 1 to 16.

    Returns:
        Tensor of w's shape and dtype.

    Raises:
        TypeError: w is no such tensor, or bits no integer.
        ValueError: bits out of range.

    Example:
        >>> quantize.dorefa_weight(torch.tensor([0.8, 0.1, -0.3, -2.0]), 2)
        tensor([ 1.0000,  0.3333, -0.3333, -1.0000])
    """
    check_integer("dorefa_weight", "bits", bits, 1, 16)
    return on_floats("dorefa_weight", "w", w, lambda w: torch.ops.quantize.dorefa(w, int(bits), False))


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """``round(L * clip(x, 0, 1)) / L`` with L = 2^bits - 1 (DoReFa, arXiv 1606.06160, section 2.4).

    The gradient passes where 0 <= x <= 1; one bit an element is kept for it. NaN stays.

    Args:
        x: Tensor of any shape and floating-point type; float64 is computed in float32.
        bits: 1 to 16.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: x is no such tensor, or bits no integer.
        ValueError: bits out of range.

    Example:
        >>> quantize.dorefa_activation(torch.tensor([0.1, 0.2, 0.6, 3.0]), 2)
        tensor([0.0000, 0.3333, 0.6667, 1.0000])
    """
    check_integer("dorefa_activation", "bits", bits, 1, 16)
    return on_floats("dorefa_activation", "x", x, lambda x: torch.ops.quantize.unit_activation(x, 2 ** int(bits) - 1))


class DorefaQuantizer(WeightQuantizer):
    """What :class:`quantize.DoReFa` makes of a weight."""

    config: DoReFa

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight: shape and dtype as given."""
        return torch.ops.quantize.dorefa(weight, self.config.weight_bits, self.config.scale_adjusted)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As WeightQuantizer's; the levels odd, -(2^bits - 1) to 2^bits - 1, the scales all alike."""
        quantized, scale, _ = torch.ops.quantize.dorefa_quantize(
            weight.detach().float(), self.config.weight_bits, self.config.scale_adjusted
        )
        levels = torch.where(scale > 0, quantized / scale, 1).round().movedim(self.axis, 0).contiguous()
        return levels, scale.repeat(len(levels))


class UnitQuantizer(nn.Module):
    """``x`` on the grid ``step * {0, ..., 2^bits - 1}``, step = 1 / (2^bits - 1), for the input of a layer; see
    :func:`quantize.dorefa_activation`.
    """

    kind, initialized = "unit", True

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    @property
    def levels(self) -> int:
        """Steps from the grid's lower end to its upper."""
        return 2**self.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid; shape and dtype as given."""
        return torch.ops.quantize.unit_activation(x, self.levels)

    def extra_repr(self) -> str:
        """The bits."""
        return f"bits={self.bits}"


def quantize_gradient_of(module: nn.Module, args, output: Tensor) -> Tensor:
    """The forward hook of layers with gradient bits: the output, whose gradient is quantized on its way back (equation 12)."""
    if not (module.training and parametrize.is_parametrized(module, "weight")):
        return output
    quantizer = next((q for q in module.parametrizations["weight"] if isinstance(q, DorefaQuantizer)), None)
    if quantizer is None:
        return output
    # Drawn without gradients too: in a reentrant checkpoint's first pass, else each segment would start from the same generator's state.
    seed = draw_seed()
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    return torch.ops.quantize.quantize_gradient(output, quantizer.config.gradient_bits, seed)


def without_gradient_bits(model: nn.Module) -> None:
    """Takes the hook out of all layers, in place."""
    for module in model.modules():
        remove_hooks(module, lambda hook: hook is quantize_gradient_of)
