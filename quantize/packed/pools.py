"""Max pools of converted models: of one image they can take as long as the packed convolutions around them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..layers.functional import numbers_of
from .kernels import value_only
from .pending import Pending
from .symbolic import as_node


class PackedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d for inference: PyTorch's own finds the maxima's indices as well, one window after the other. Behind a first convolution
    (stems.py) it is computed with that."""

    plain = nn.MaxPool2d

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        if isinstance(input, fx.Proxy):
            return as_node(self, input)
        if type(input) is Pending:
            found = input.pool(*self._window()[:3]) if goes_with_stem(self) else None
            if found is not None:
                return found
            input = input.value()
        if (
            type(input) is not Tensor
            or input.device.type != "cpu"
            or self.return_indices
            or torch.compiler.is_compiling()
            or not value_only(input)
        ):
            return super().forward(input)
        return torch.ops.quantize.max_pool_values(input, *self._window(), self.ceil_mode)

    def _window(self) -> list[list[int]]:
        return [numbers_of(value, 2) for value in (self.kernel_size, self.stride, self.padding, self.dilation)]


def goes_with_stem(pool: nn.MaxPool2d) -> bool:
    """Whether `pool` can be computed with the convolution before it."""
    return not pool.return_indices and not pool.ceil_mode and numbers_of(pool.dilation, 2) == [1, 1]
