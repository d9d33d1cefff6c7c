"""The ReLU family and dropout, by masks of one bit an element."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .base import CompressedLayer, forward_of_layer


class QReLU(CompressedLayer, nn.ReLU):
    """nn.ReLU that keeps one exact bit an element; ``inplace=True`` works. The same arguments and ``config=``.

    Example:
        >>> quantize.QReLU(inplace=True)(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    plain = nn.ReLU

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        return functional.clip(input, inplace=self.inplace, plain=lambda: plain(input))


class QReLU6(CompressedLayer, nn.ReLU6):
    """nn.ReLU6 that keeps one exact bit an element. The same arguments and ``config=``.

    Example:
        >>> quantize.QReLU6()(torch.tensor([-1.0, 7.0]))
        tensor([0., 6.])
    """

    plain = nn.ReLU6

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        return functional.clip(input, high=6.0, inplace=self.inplace, plain=lambda: plain(input))


class QLeakyReLU(CompressedLayer, nn.LeakyReLU):
    """nn.LeakyReLU that keeps one exact bit an element. The same arguments and ``config=``. A NaN's gradient passes as a positive number's;
    PyTorch multiplies it by the slope.

    Example:
        >>> quantize.QLeakyReLU(0.5)(torch.tensor([-1.0, 2.0]))
        tensor([-0.5000,  2.0000])
    """

    plain = nn.LeakyReLU

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        return functional.clip(input, negative_slope=self.negative_slope, inplace=self.inplace, plain=lambda: plain(input))


class QDropout(CompressedLayer, nn.Dropout):
    """nn.Dropout that keeps its mask in one bit an element. The same arguments and ``config=``.

    Example:
        >>> quantize.QDropout(0.1).eval()(torch.ones(2))
        tensor([1., 1.])
    """

    plain = nn.Dropout

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        if not self.compresses:
            return super().forward(input)
        return functional.dropout(input, self.p, self.training, self.inplace)
