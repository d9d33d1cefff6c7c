"""torch.nn.functional's norms of rows, that keep their normalized input packed: layer_norm, rms_norm, group_norm and instance_norm.

As in functional.py, each takes its namesake's arguments after the layer's state, and `plain` is the namesake with its arguments, called
where nothing is compressed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation.state import LayerState
from ..ops import ops_for
from .autocast import raised
from .functional import compressible, pack, tracks

# Values of a row, at least. Of fewer, noise in one is much of their mean and deviation, and these two are much of what is kept.
SHORTEST = 16


def are_long(input: Tensor, rows: int) -> bool:
    """Whether the `rows` of each sample are long enough."""
    return input.dim() > 1 and input.numel() >= input.shape[0] * rows * SHORTEST


def layer_norm(state: LayerState, input: Tensor, shape, weight: Tensor | None, bias: Tensor | None, eps: float, *, plain) -> Tensor:
    """F.layer_norm."""
    shape = [int(size) for size in shape] if isinstance(shape, (tuple, list)) else None
    if not _of_rows(input, shape, weight, bias):
        return plain()
    input, weight, bias = raised("layer_norm", input, weight, bias)
    packed = pack(state, F.layer_norm(input.detach(), shape, eps=eps), is_norm=True)
    return plain() if packed is None else ops_for(input, weight, bias).layer_norm(input, shape, weight, bias, eps, *packed)


def rms_norm(state: LayerState, input: Tensor, shape, weight: Tensor | None, eps: float | None, *, plain) -> Tensor:
    """F.rms_norm. A weight of another dtype than the input's is left to PyTorch, which warns of it."""
    shape = [int(size) for size in shape] if isinstance(shape, (tuple, list)) else None
    if not _of_rows(input, shape, weight):
        return plain()
    input, weight = raised("rms_norm", input, weight)
    if weight is not None and weight.dtype != input.dtype:
        return plain()
    packed = pack(state, F.rms_norm(input.detach(), shape, eps=eps), is_norm=True)
    return plain() if packed is None else ops_for(input, weight).rms_norm(input, shape, weight, eps, *packed)


def group_norm(state: LayerState, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, plain) -> Tensor:
    """F.group_norm."""
    if not _of_channels(input, weight, bias) or not isinstance(groups, int) or groups < 1 or input.shape[1] % groups:
        return plain()
    if not are_long(input, groups):
        return plain()
    input, weight, bias = raised("group_norm", input, weight, bias)
    packed = pack(state, F.group_norm(input.detach(), groups, eps=eps), is_norm=True)
    return plain() if packed is None else ops_for(input, weight, bias).group_norm(input, groups, weight, bias, eps, *packed)


def instance_norm(
    state: LayerState, input: Tensor, running_mean, running_var, weight, bias, use_input_stats: bool, momentum: float, eps: float, *, plain
) -> Tensor:
    """F.instance_norm. By running statistics, which are fixed, it is PyTorch's."""
    fits = use_input_stats and _of_channels(input, weight, bias) and input.dim() > 2
    if not fits or not are_long(input, input.shape[1]) or (running_mean is None) != (running_var is None):
        return plain()
    if running_mean is not None and (running_mean.shape != input.shape[1:2] or running_var.shape != running_mean.shape):
        return plain()
    input, weight, bias = raised("instance_norm", input, weight, bias)
    packed = pack(state, F.instance_norm(input.detach(), eps=eps), is_norm=True)
    if packed is None:
        return plain()
    ops = ops_for(input, weight, bias, running_mean, running_var)
    return ops.instance_norm(input, weight, bias, running_mean, running_var, momentum, eps, *packed)


def _of_rows(input, shape: list[int] | None, *parameters: Tensor | None) -> bool:
    """Whether there is something to keep of a norm over the last dimensions, with samples in the first."""
    if not isinstance(input, Tensor) or not shape or compressible(input) is not None or not tracks(input, *parameters[:1]):
        return False
    fits = input.dim() > len(shape) and list(input.shape[-len(shape) :]) == shape and math.prod(shape) >= SHORTEST
    return fits and _fit(input, torch.Size(shape), parameters)


def _of_channels(input, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Likewise, of a norm over parts of a sample with parameters for each channel."""
    if not isinstance(input, Tensor) or compressible(input) is not None or not tracks(input, weight):
        return False
    return input.dim() > 1 and _fit(input, input.shape[1:2], (weight, bias))


def _fit(input: Tensor, shape: torch.Size, parameters) -> bool:
    return all(t is None or (t.shape == shape and t.device == input.device) for t in parameters)
