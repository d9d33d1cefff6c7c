"""Clips behind packed convolutions, which are computed with them (chains.py)."""

from __future__ import annotations

from torch import Tensor, fx, nn

from .pending import Pending
from .symbolic import as_node


class _PackedClip(nn.Module):
    """Mixin: an output that waits is asked itself. PyTorch's way to what is no Tensor would take longer than a small layer."""

    plain: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor | Pending:
        """As the plain layer's."""
        if type(input) is not Pending:
            return as_node(self, input) if isinstance(input, fx.Proxy) else super().forward(input)
        return input.clip(*((self.min_val, self.max_val) if isinstance(self, nn.Hardtanh) else (0.0,)))


class PackedReLU(_PackedClip, nn.ReLU):
    """nn.ReLU behind a packed convolution."""

    plain = nn.ReLU


class PackedReLU6(_PackedClip, nn.ReLU6):
    """nn.ReLU6 behind a packed convolution."""

    plain = nn.ReLU6


class PackedHardtanh(_PackedClip, nn.Hardtanh):
    """nn.Hardtanh behind a packed convolution."""

    plain = nn.Hardtanh


CLIPS = {cls.plain: cls for cls in (PackedReLU, PackedReLU6, PackedHardtanh)}
