"""Layer, RMS, group and instance norms whose normalized input is kept in 1 to 8 bits."""

from __future__ import annotations

import math

from torch import Tensor, nn

from . import functional, row_norms
from .base import CompressedLayer, forward_of_layer


class _OfRows(CompressedLayer):
    """Of norms over the last dimensions."""

    lossy = True

    def _normalize(self, input: Tensor, plain) -> Tensor:
        raise NotImplementedError

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        if self.training:
            functional.draw_as_if_tracked(self._state, input, math.prod(self.normalized_shape) >= row_norms.SHORTEST)
        return self._normalize(input, lambda: plain(input))


class QLayerNorm(_OfRows, nn.LayerNorm):
    """nn.LayerNorm that keeps its normalized input packed for the backward pass; the same arguments and ``config=``. Rows of fewer than 16
    values are kept as they are.

    Statistics and output come from the full-precision input, bit-equal to the plain layer's.

    Example:
        >>> quantize.QLayerNorm(64)(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
    """

    plain = nn.LayerNorm

    def _normalize(self, input: Tensor, plain) -> Tensor:
        return row_norms.layer_norm(self._state, input, self.normalized_shape, self.weight, self.bias, self.eps, plain=plain)


class QRMSNorm(_OfRows, nn.RMSNorm):
    """nn.RMSNorm that keeps its normalized input packed for the backward pass; the same arguments and ``config=``. Rows of fewer than 16
    values are kept as they are.

    Example:
        >>> quantize.QRMSNorm(64)(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
    """

    plain = nn.RMSNorm

    def _normalize(self, input: Tensor, plain) -> Tensor:
        return row_norms.rms_norm(self._state, input, self.normalized_shape, self.weight, self.eps, plain=plain)


class QGroupNorm(CompressedLayer, nn.GroupNorm):
    """nn.GroupNorm that keeps its normalized input packed for the backward pass; the same arguments and ``config=``. Groups of fewer
    than 16 values are kept as they are.

    Example:
        >>> quantize.QGroupNorm(4, 16)(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """

    plain = nn.GroupNorm
    lossy = True

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        plain = super().forward
        if not self.compresses:
            return plain(input)
        if self.training:
            functional.draw_as_if_tracked(self._state, input, row_norms.are_long(input, self.num_groups))
        return row_norms.group_norm(self._state, input, self.num_groups, self.weight, self.bias, self.eps, plain=lambda: plain(input))


class _QInstanceNorm(CompressedLayer):
    lossy = True

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        # Checks of the input, and inputs without a batch, are the plain forward's, which ends in this.
        plain = super()._apply_instance_norm
        if not self.compresses:
            return plain(input)
        use_batch = self.training or not self.track_running_stats
        if self.training:
            functional.draw_as_if_tracked(self._state, input, row_norms.are_long(input, input.shape[1]))
        return row_norms.instance_norm(
            self._state, input, self.running_mean, self.running_var, self.weight, self.bias, use_batch,
            0.0 if self.momentum is None else self.momentum, self.eps, plain=lambda: plain(input),
        )  # fmt: skip

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        return super().forward(input)


class QInstanceNorm1d(_QInstanceNorm, nn.InstanceNorm1d):
    """nn.InstanceNorm1d that keeps its normalized input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QInstanceNorm1d(16)(torch.randn(4, 16, 20)).shape
        torch.Size([4, 16, 20])
    """

    plain = nn.InstanceNorm1d


class QInstanceNorm2d(_QInstanceNorm, nn.InstanceNorm2d):
    """nn.InstanceNorm2d that keeps its normalized input packed for the backward pass; the same arguments and ``config=``. Channels of fewer
    than 16 positions are kept as they are.

    Example:
        >>> quantize.QInstanceNorm2d(16)(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """

    plain = nn.InstanceNorm2d


class QInstanceNorm3d(_QInstanceNorm, nn.InstanceNorm3d):
    """nn.InstanceNorm3d that keeps its normalized input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QInstanceNorm3d(16)(torch.randn(4, 16, 4, 4, 4)).shape
        torch.Size([4, 16, 4, 4, 4])
    """

    plain = nn.InstanceNorm3d
