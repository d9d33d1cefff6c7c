"""The parametrizations that prepare() registers on a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..dtypes import FLOATS
from .config import XNOR, DiffQ, DoReFa, WeightConfig

SMALLEST_STEP = 2.0**-100  # what a learned step at zero or below counts as (csrc/weight/lsq.h)


def check_floats(who: str, name: str, x) -> None:
    """TypeError unless `x` is a floating-point tensor with all of its elements in memory."""
    if not isinstance(x, Tensor) or x.dtype not in (*FLOATS, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: {name} must be a floating-point Tensor of 16, 32 or 64 bits; got {found}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{who}: {name} must be a dense Tensor; got {'a nested one' if x.is_nested else x.layout}")


def on_floats(who: str, name: str, x, function) -> Tensor:
    """`function` of any floating-point tensor: a float64 one in float32. TypeError for others."""
    check_floats(who, name, x)
    return function(x.float()).double() if x.dtype == torch.float64 else function(x)


class WeightQuantizer(nn.Module):
    """Quantizes a weight in the forward pass and lets its gradient straight through, but not to weights beyond the largest level.

    `axis`: the dimension of output channels, each with a scale of its own.
    """

    def __init__(self, config: WeightConfig, axis: int = 0):
        super().__init__()
        self.config, self.axis = config, axis

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight: shape and dtype as given."""
        config = self.config
        rows = weight.movedim(self.axis, 0) if self.axis else weight
        quantized = torch.ops.quantize.fake_quantize(rows, config.codebook, config.weight_bits, config.scale == "least_squares")
        return quantized.movedim(0, self.axis) if self.axis else quantized

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (float32, whole numbers, the channel axis first) and scales (float32 [channels]) whose product is the quantized weight."""
        config = self.config
        rows = weight.detach().float().movedim(self.axis, 0).contiguous()
        quantized, scale, _ = torch.ops.quantize.channel_quantize(
            rows, config.codebook, config.weight_bits, config.scale == "least_squares"
        )
        columns = scale.view(-1, *[1] * (rows.dim() - 1))
        return torch.where(columns > 0, quantized / columns, 0).round(), scale

    def extra_repr(self) -> str:
        """The configuration."""
        return repr(self.config)


class LearnedStepQuantizer(WeightQuantizer):
    """A weight on the grid ``step * {-L, ..., L}``, L = 2^(bits-1) - 1, with one learned step for the layer (LSQ, arXiv 1902.08153).

    The step's gradient is scaled by 1/sqrt(elements * L), section 2.2 of the paper. It starts at max(|mean - 3 std|, |mean + 3 std|) /
    2^(bits-1) of `weight` (LSQ+, arXiv 2004.09576), or at 1 where that is zero.
    """

    def __init__(self, config: WeightConfig, weight: Tensor, axis: int = 0):
        super().__init__(config, axis)
        std, mean = torch.std_mean(weight.detach().double(), correction=0)
        step = (mean.abs() + 3 * std) / 2 ** (config.weight_bits - 1)
        self.step = nn.Parameter(torch.where(step > SMALLEST_STEP, step, 1).float())

    @property
    def largest(self) -> int:
        """L, the largest level."""
        return 2 ** (self.config.weight_bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight: shape and dtype as given."""
        scale = 1 / math.sqrt(weight.numel() * self.largest)
        step = self.step.float()  # model.half() takes it along
        return torch.ops.quantize.lsq(weight, step, torch.full_like(step, self.largest), 2 * self.largest, scale)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As WeightQuantizer's, the scales all alike. ValueError if the step is not finite."""
        step = self.step.float().clamp(min=SMALLEST_STEP)
        if not step.isfinite():
            raise ValueError(f"Uniform: the learned step must be finite; got {float(step)}")
        rows = weight.float().movedim(self.axis, 0).contiguous()
        return (self(rows) / step).round(), step.repeat(len(rows))


def make_quantizer(config: WeightConfig, weight: Tensor, axis: int = 0) -> WeightQuantizer:
    """What `config` asks for, for a `weight` with its output channels in dimension `axis`."""
    from .binary import BinaryQuantizer  # these stand on this file
    from .diffq import DiffQQuantizer
    from .dorefa import DorefaQuantizer

    if isinstance(config, DiffQ):
        return DiffQQuantizer(config, weight, axis)
    if isinstance(config, XNOR):
        return BinaryQuantizer(config, axis)
    if isinstance(config, DoReFa):
        return DorefaQuantizer(config, axis)
    return LearnedStepQuantizer(config, weight, axis) if config.scale == "learned" else WeightQuantizer(config, axis)


def make_activation_quantizer(config: WeightConfig, device) -> nn.Module:
    """What stands before the input of a layer whose `config` has activation bits."""
    from .binary import SignQuantizer
    from .dorefa import UnitQuantizer
    from .learned_activation import LearnedBitsQuantizer
    from .lsq import ActivationQuantizer

    if isinstance(config, XNOR):
        return SignQuantizer(config.sign_gradient)
    if isinstance(config, DoReFa):
        return UnitQuantizer(config.activation_bits)
    if config.activation_bits == "learned":
        return LearnedBitsQuantizer(config, device)
    return ActivationQuantizer(config.activation_bits, device)
