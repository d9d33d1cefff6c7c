"""The linear layer whose input is kept in 1 to 8 bits."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .base import CompressedLayer, forward_of_layer


class QLinear(CompressedLayer, nn.Linear):
    """nn.Linear that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Inputs of any rank, Tensor[*, in_features]; dimension 0 is the sample axis. Forward is the plain layer's on the full-precision
    input; the weight's gradient is unbiased, the input's exact.

    Example:
        >>> layer = quantize.QLinear(64, 10, config=quantize.ActivationConfig(bits=4, max_bits=4))
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 10])
    """

    plain = nn.Linear
    lossy = True

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        if not self.compresses:
            return super().forward(input)
        if self.training:
            functional.draw_as_if_tracked(self._state, input, self.weight.requires_grad)
        return functional.linear(self._state, input, self.weight, self.bias)
