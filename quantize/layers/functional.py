"""torch.nn.functional's layers with compressed activations: the one place where layers, functional calls and subclasses meet.

Each takes the arguments of its namesake after the layer's state (`LayerState`, or None where nothing is lossy), does exactly what the
namesake does forward, and falls back to it where there is nothing to compress.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation.state import NOT_KEPT, LayerState, Packed

_ops = torch.ops.quantize
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_POOL_POSITIONS = 256  # what an 8-bit offset can tell apart


def compressible(x: Tensor) -> str | None:
    """None, or the reason why `x` cannot be compressed."""
    if x.dtype not in FLOATS:
        return f"{str(x.dtype).removeprefix('torch.')} is kept as it is"
    if x.numel() == 0:
        return "empty"
    if x.layout != torch.strided or x.is_nested:
        return f"{x.layout} tensors are kept as they are"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"no kernels for {x.device.type}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    return None


def tracks(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the arguments of a convolution or a linear layer: before packing, so that what is kept is what is used."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _pack(state: LayerState, x: Tensor, is_norm: bool = False) -> Packed | None:
    """`x` packed, or None where a sample is so small (one or two elements) that ranges outweigh the saving."""
    per_sample = x.numel() // x.shape[0] if x.dim() else 1
    if per_sample * x.element_size() * 8 <= 32 + state.config.max_bits * per_sample:
        return None
    return state.pack(x, is_norm)


def _tuple(value, n: int) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * n


def conv(
    state, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, plain, transposed=False, output_padding=0
) -> Tensor:
    """F.conv1d/2d/3d and F.conv_transpose1d/2d/3d; `plain` is the namesake, called with nothing compressed."""
    reason = compressible(input)
    n = weight.dim() - 2
    if not isinstance(padding, str) and reason is None and tracks(input, weight, bias) and input.dim() in (n + 1, n + 2):
        input, weight, bias = _autocast(input, weight, bias)
        if input.dtype == weight.dtype and input.device == weight.device and n in (1, 2, 3):
            unbatched = input.dim() == n + 1
            x = input.unsqueeze(0) if unbatched else input
            packed = _pack(state, x) if weight.requires_grad else NOT_KEPT
            if packed is not None:
                y = _ops.conv(
                    x, weight, bias, _tuple(stride, n), _tuple(padding, n), _tuple(dilation, n), transposed, _tuple(output_padding, n),
                    groups, *packed,
                )  # fmt: skip
                return y.squeeze(0) if unbatched else y
    elif isinstance(padding, str) and reason is None and tracks(input, weight, bias) and padding in ("same", "valid"):
        input, padding = _resolve_padding(input, weight, padding, _tuple(dilation, n), _tuple(stride, n))
        if padding is not None:
            return conv(state, input, weight, bias, stride, padding, dilation, groups, plain=plain)
        padding = "same"
    if transposed:
        return plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return plain(input, weight, bias, stride, padding, dilation, groups)


def _resolve_padding(input: Tensor, weight: Tensor, padding: str, dilation: list[int], stride: list[int]):
    """A string padding as numbers; what "same" needs more at the end of an even kernel is padded beforehand, as F.conv2d does."""
    if padding == "valid":
        return input, [0] * len(dilation)
    if any(s != 1 for s in stride):
        return input, None  # the namesake refuses it
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        extra = [side for t in reversed(total) for side in (0, t % 2)]
        input = F.pad(input, extra)
    return input, [t // 2 for t in total]


def linear(state, input, weight, bias=None) -> Tensor:
    """F.linear on inputs of any rank."""
    if compressible(input) is None and tracks(input, weight, bias) and weight.dim() == 2:
        input, weight, bias = _autocast(input, weight, bias)
        if input.dtype == weight.dtype and input.device == weight.device and input.shape[-1:] == weight.shape[1:]:
            x = input.unsqueeze(0) if input.dim() == 1 else input
            packed = _pack(state, x) if weight.requires_grad else NOT_KEPT
            if packed is not None:
                y = _ops.linear(x, weight, bias, *packed)
                return y.squeeze(0) if input.dim() == 1 else y
    return F.linear(input, weight, bias)


def batch_norm(state, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> Tensor:
    """F.batch_norm. With fixed statistics and a frozen weight nothing is kept."""
    fits = compressible(input) is None and tracks(input, weight, bias) and input.dim() >= 2
    if fits and input.numel() > (input.shape[1] if training else 0):  # one value per channel: the namesake's error
        needed = training or (weight is not None and weight.requires_grad)
        packed = _pack(state, input, is_norm=True) if needed else NOT_KEPT
        if packed is not None:
            return _ops.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, *packed)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def relu(input, negative_slope=0.0, max_value=float("inf"), inplace=False, *, plain) -> Tensor:
    """The ReLU family by an exact mask of one bit; `plain()` is the namesake, called where nothing is to be kept."""
    if not tracks(input) or compressible(input) is not None or negative_slope < 0:
        return plain()
    if not inplace:
        return _ops.relu(input, negative_slope, max_value)
    if not _is_packed_order(input):
        return plain()
    return _ops.relu_(input, negative_slope, max_value)


def _is_packed_order(x: Tensor) -> bool:
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def dropout(input, p=0.5, training=True, inplace=False) -> Tensor:
    """F.dropout, whose mask is kept in one bit."""
    if not training or p == 0.0 or inplace or not tracks(input) or compressible(input) is not None:
        return F.dropout(input, p, training, inplace)
    return _ops.dropout(input, p)


def max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, *, n, plain):
    """F.max_pool1d/2d/3d by offsets within the window. 1-d pools are 2-d ones of height 1."""
    kernel = _tuple(kernel_size, n)
    positions = 1
    for k in kernel:
        positions *= k
    fits = tracks(input) and compressible(input) is None and positions <= MAX_POOL_POSITIONS and input.dim() in (n + 1, n + 2)
    if not fits or return_indices:
        return plain()
    stride = _tuple(stride, n) if stride not in (None, [], ()) else kernel
    padding, dilation = _tuple(padding, n), _tuple(dilation, n)
    if n == 1:
        y, _ = _ops.max_pool(input.unsqueeze(-2), [1, *kernel], [1, *stride], [0, *padding], [1, *dilation], ceil_mode)
        return y.squeeze(-2)
    return _ops.max_pool(input, kernel, stride, padding, dilation, ceil_mode)[0]


def avg_pool(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None, *, n, plain
) -> Tensor:
    """F.avg_pool1d/2d/3d, of which only the input's shape is kept."""
    if not tracks(input) or compressible(input) is not None or input.dim() not in (n + 1, n + 2):
        return plain()
    kernel = _tuple(kernel_size, n)
    stride = _tuple(stride, n) if stride not in (None, [], ()) else kernel
    padding = _tuple(padding, n)
    if n == 1:
        y = _ops.avg_pool(input.unsqueeze(-2), [1, *kernel], [1, *stride], [0, *padding], ceil_mode, count_include_pad, None)
        return y.squeeze(-2)
    return _ops.avg_pool(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool(input, output_size, *, n, plain) -> Tensor:
    """F.adaptive_avg_pool1d/2d/3d, of which only the input's shape is kept."""
    if not tracks(input) or compressible(input) is not None or input.dim() not in (n + 1, n + 2):
        return plain()
    size = _tuple(output_size, n)
    size = [input.shape[d - n] if s is None else s for d, s in enumerate(size)]
    if n == 1:
        return _ops.adaptive_avg_pool(input.unsqueeze(-2), [1, *size]).squeeze(-2)
    if all(s == 1 for s in size):
        return plain()  # a mean: keeps nothing
    return _ops.adaptive_avg_pool(input, size)
