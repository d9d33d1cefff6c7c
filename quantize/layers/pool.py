"""Pools that keep shapes and 8-bit offsets instead of their inputs; upsampling, which keeps nothing."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .base import CompressedLayer, forward_of_layer


class _QMaxPool(CompressedLayer):
    spatial = 0

    @forward_of_layer
    def forward(self, input: Tensor):
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        return functional.max_pool(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices,
            n=self.spatial, plain=lambda: plain(input),
        )  # fmt: skip


class _QAvgPool(CompressedLayer):
    spatial = 0

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        return functional.avg_pool(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            getattr(self, "divisor_override", None), n=self.spatial, plain=lambda: plain(input),
        )  # fmt: skip


class _QAdaptiveAvgPool(CompressedLayer):
    spatial = 0

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        return functional.adaptive_avg_pool(input, self.output_size, n=self.spatial, plain=lambda: plain(input))


class QMaxPool1d(_QMaxPool, nn.MaxPool1d):
    """nn.MaxPool1d that keeps a byte for each output: the maximum's offset in its window. The same arguments and ``config=``.

    Example:
        >>> quantize.QMaxPool1d(2)(torch.randn(2, 4, 8)).shape
        torch.Size([2, 4, 4])
    """

    plain, spatial = nn.MaxPool1d, 1


class QMaxPool2d(_QMaxPool, nn.MaxPool2d):
    """nn.MaxPool2d that keeps a byte for each output: the maximum's offset in its window. The same arguments and ``config=``.

    Example:
        >>> quantize.QMaxPool2d(2)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    plain, spatial = nn.MaxPool2d, 2


class QMaxPool3d(_QMaxPool, nn.MaxPool3d):
    """nn.MaxPool3d that keeps a byte for each output: the maximum's offset in its window. The same arguments and ``config=``.

    Example:
        >>> quantize.QMaxPool3d(2)(torch.randn(2, 4, 8, 8, 8)).shape
        torch.Size([2, 4, 4, 4, 4])
    """

    plain, spatial = nn.MaxPool3d, 3


class QAvgPool1d(_QAvgPool, nn.AvgPool1d):
    """nn.AvgPool1d that keeps only its input's shape. The same arguments and ``config=``.

    Example:
        >>> quantize.QAvgPool1d(2)(torch.randn(2, 4, 8)).shape
        torch.Size([2, 4, 4])
    """

    plain, spatial = nn.AvgPool1d, 1


class QAvgPool2d(_QAvgPool, nn.AvgPool2d):
    """nn.AvgPool2d that keeps only its input's shape. The same arguments and ``config=``.

    Example:
        >>> quantize.QAvgPool2d(2)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 4, 4])
    """

    plain, spatial = nn.AvgPool2d, 2


class QAvgPool3d(_QAvgPool, nn.AvgPool3d):
    """nn.AvgPool3d that keeps only its input's shape. The same arguments and ``config=``.

    Example:
        >>> quantize.QAvgPool3d(2)(torch.randn(2, 4, 8, 8, 8)).shape
        torch.Size([2, 4, 4, 4, 4])
    """

    plain, spatial = nn.AvgPool3d, 3


class QAdaptiveAvgPool1d(_QAdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """nn.AdaptiveAvgPool1d that keeps only its input's shape. The same arguments and ``config=``.

    Example:
        >>> quantize.QAdaptiveAvgPool1d(1)(torch.randn(2, 4, 8)).shape
        torch.Size([2, 4, 1])
    """

    plain, spatial = nn.AdaptiveAvgPool1d, 1


class QAdaptiveAvgPool2d(_QAdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d that keeps only its input's shape. The same arguments and ``config=``.

    Example:
        >>> quantize.QAdaptiveAvgPool2d(1)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 1, 1])
    """

    plain, spatial = nn.AdaptiveAvgPool2d, 2


class QAdaptiveAvgPool3d(_QAdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """nn.AdaptiveAvgPool3d that keeps only its input's shape. The same arguments and ``config=``.

    Example:
        >>> quantize.QAdaptiveAvgPool3d(1)(torch.randn(2, 4, 8, 8, 8)).shape
        torch.Size([2, 4, 1, 1, 1])
    """

    plain, spatial = nn.AdaptiveAvgPool3d, 3


class QUpsample(CompressedLayer, nn.Upsample):
    """nn.Upsample, whose backward needs no more than its input's shape already. The same arguments and ``config=``.

    Example:
        >>> quantize.QUpsample(scale_factor=2)(torch.randn(1, 3, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    plain = nn.Upsample
