"""The parametrization that prepare() registers on a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import WeightConfig


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
