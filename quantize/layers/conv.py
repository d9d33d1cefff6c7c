"""Convolutions whose input is kept in 1 to 8 bits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .base import CompressedLayer, forward_of_layer


class _QConv(CompressedLayer):
    lossy = True
    function = None  # F.conv1d, ...

    @forward_of_layer
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.compresses:
            return super()._conv_forward(input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        if self.training:
            functional.draw_as_if_tracked(self._state, input, weight.requires_grad)
        return functional.conv(
            self._state, input, weight, bias, self.stride, padding, self.dilation, self.groups, plain=type(self).function
        )


class _QConvTranspose(CompressedLayer):
    lossy = True
    function = None
    spatial = 0

    @forward_of_layer
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the plain layer's."""
        if not self.compresses or self.padding_mode != "zeros":
            return super().forward(input, output_size)
        output_padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, self.spatial, self.dilation)
        if self.training:
            functional.draw_as_if_tracked(self._state, input, self.weight.requires_grad)
        return functional.conv(
            self._state, input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            plain=type(self).function, transposed=True, output_padding=output_padding,
        )  # fmt: skip


class QConv1d(_QConv, nn.Conv1d):
    """nn.Conv1d that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QConv1d(8, 16, 3)(torch.randn(4, 8, 9)).shape
        torch.Size([4, 16, 7])
    """

    plain, function = nn.Conv1d, staticmethod(F.conv1d)


class QConv2d(_QConv, nn.Conv2d):
    """nn.Conv2d that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Forward is the plain layer's on the full-precision input; the weight's gradient is unbiased, the input's exact.

    Example:
        >>> quantize.QConv2d(8, 16, 3)(torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 16, 7, 7])
    """

    plain, function = nn.Conv2d, staticmethod(F.conv2d)


class QConv3d(_QConv, nn.Conv3d):
    """nn.Conv3d that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QConv3d(8, 16, 3)(torch.randn(4, 8, 9, 9, 9)).shape
        torch.Size([4, 16, 7, 7, 7])
    """

    plain, function = nn.Conv3d, staticmethod(F.conv3d)


class QConvTranspose1d(_QConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QConvTranspose1d(8, 16, 3)(torch.randn(4, 8, 9)).shape
        torch.Size([4, 16, 11])
    """

    plain, function, spatial = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d), 1


class QConvTranspose2d(_QConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Forward is the plain layer's on the full-precision input; the weight's gradient is unbiased, the input's exact.

    Example:
        >>> quantize.QConvTranspose2d(8, 16, 3)(torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 16, 11, 11])
    """

    plain, function, spatial = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d), 2


class QConvTranspose3d(_QConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d that keeps its input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QConvTranspose3d(8, 16, 3)(torch.randn(4, 8, 9, 9, 9)).shape
        torch.Size([4, 16, 11, 11, 11])
    """

    plain, function, spatial = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d), 3
