"""Batch norms that keep their normalized input in 1 to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .base import CompressedLayer, forward_of_layer
from .sync_batch_norm import sync_batch_norm


class _QBatchNorm(CompressedLayer):
    lossy = True

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        if not self.compresses:
            return super().forward(input)
        self._check_input_dim(input)
        momentum = self._count_batch()
        use_batch = self.training or self.running_mean is None
        keep_running = not self.training or self.track_running_stats
        if self.training:
            functional.draw_as_if_tracked(self._state, input, True)
        return functional.batch_norm(
            self._state, input, self.running_mean if keep_running else None, self.running_var if keep_running else None,
            self.weight, self.bias, use_batch, momentum, self.eps,
        )  # fmt: skip

    def _count_batch(self) -> float:
        """Counts the batch and returns the weight of its statistics in the running ones."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


class QBatchNorm1d(_QBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d that keeps its normalized input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QBatchNorm1d(16)(torch.randn(4, 16)).shape
        torch.Size([4, 16])
    """

    plain = nn.BatchNorm1d


class QBatchNorm2d(_QBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps its normalized input packed for the backward pass; the same arguments and ``config=``.

    Statistics and output come from the full-precision input, bit-equal to the plain layer's.

    Example:
        >>> layer = quantize.QBatchNorm2d(16, config=quantize.ActivationConfig(bits=2, max_bits=2))
        >>> layer(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """

    plain = nn.BatchNorm2d


class QBatchNorm3d(_QBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d that keeps its normalized input packed for the backward pass; the same arguments and ``config=``.

    Example:
        >>> quantize.QBatchNorm3d(16)(torch.randn(4, 16, 2, 3, 3)).shape
        torch.Size([4, 16, 2, 3, 3])
    """

    plain = nn.BatchNorm3d


class QSyncBatchNorm(_QBatchNorm, nn.SyncBatchNorm):
    """nn.SyncBatchNorm that keeps its normalized input packed for the backward pass; the same arguments and ``config=``.

    Over several processes its backward decodes the whole input at once, where QBatchNorm's on CPUs goes piece by piece.

    Also for CPU tensors and gloo, and for ranks with unequal or empty batches. Without an initialised process group of more than one
    process it is a batch norm over the local batch. On CPUs DistributedDataParallel refuses every nn.SyncBatchNorm, this one too: put it
    in (or QModule around the model's ones) after that has looked at the model.

    Example:
        >>> quantize.QSyncBatchNorm(16)(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """

    plain = nn.SyncBatchNorm

    @forward_of_layer
    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        group = self._synchronizing_group()
        if group is None:
            return super().forward(input) if self.compresses else self._plain_local(input)
        if not self.compresses and input.is_cuda:
            return nn.SyncBatchNorm.forward(self, input)
        self._check_input_dim(input)
        return sync_batch_norm(
            self._state if self.compresses else None, input, self.weight, self.bias,
            self.running_mean if self.track_running_stats else None, self.running_var if self.track_running_stats else None,
            self._count_batch(), self.eps, group,
        )  # fmt: skip

    def _synchronizing_group(self):
        if not (self.training or self.running_mean is None) or not torch.distributed.is_initialized():
            return None
        group = self.process_group or torch.distributed.group.WORLD
        return group if torch.distributed.get_world_size(group) > 1 else None

    def _plain_local(self, input: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, input)
