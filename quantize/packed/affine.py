"""A batch norm in evaluation as what it does to a channel."""

from __future__ import annotations

from torch import Tensor, nn


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """float64 scale and shift of a batch norm's channels by its running statistics, whatever they are."""
    tensors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    weight, bias, mean, var = (None if t is None else t.detach().double() for t in tensors)
    scale = (var + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
