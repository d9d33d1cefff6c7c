"""torch.nn.functional's layers with compressed activations: the one place where layers, functional calls and subclasses meet.

Each takes the arguments of its namesake after the layer's state (`LayerState`, or None where nothing is lossy), does exactly what the
namesake does forward, and falls back to it where there is nothing to compress.
"""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..activation.state import NOT_KEPT, LayerState, NormOutput, Packed, current_session, norm_behind, session_to_reuse
from ..dtypes import FLOATS
from ..ops import ops_for
from .autocast import cast_for_weight, lowered

_ops = torch.ops.quantize
MAX_POOL_POSITIONS = 256  # what an 8-bit offset can tell apart


def compressible(x: Tensor) -> str | None:
    """None, or the reason why `x` cannot be compressed."""
    if x.dtype not in FLOATS:
        return f"{str(x.dtype).removeprefix('torch.')} is kept as it is"
    if x.numel() == 0:
        return "empty"
    if x.layout != torch.strided or x.is_nested:
        return f"{x.layout} tensors are kept as they are"
    if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
        return f"{type(x).__name__} is kept as it is"
    if (type(x) is not Tensor and isinstance(x, Parameter)) or ((base := x._base) is not None and isinstance(base, Parameter)):
        return "a parameter, which is alive anyway"  # weight-standardised convolutions normalize it by F.batch_norm
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"no kernels for {x.device.type}"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    return None


def tracks(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these."""
    return torch.is_grad_enabled() and True in [t.requires_grad for t in tensors if t is not None]


def pack(state: LayerState, x: Tensor, is_norm: bool = False) -> Packed | None:
    """`x` packed, or None where samples or groups are so small (one or two elements) that ranges outweigh the saving."""
    return state.pack(x, is_norm) if saves(state, x) else None


def saves(state: LayerState, x: Tensor) -> bool:
    """Whether `x`, packed with its ranges, takes less than as it is."""
    per_sample, group = x.numel() // x.shape[0] if x.dim() else 1, state.config.group_size
    if isinstance(group, str) or group > per_sample:
        group = per_sample
    return per_sample * x.element_size() > -(-per_sample // group) * (4 + (group * state.config.max_bits + 7) // 8)


def draw_as_if_tracked(state: LayerState, input: Tensor, needed: bool) -> None:
    """For training layers under no_grad: that may be the first forward of reentrant checkpointing, and must leave the generator where the
    second will, or dropout would differ between the two."""
    untracked = needed and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if untracked and compressible(input) is None and saves(state, input):
        state.draw_seed()


def numbers_of(value, n: int) -> list[int]:
    """A window's argument as a list: one number counts for all `n` dimensions. NumPy's integers become Python's; None stays."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    for i, number in enumerate(values):
        if type(number) is not int and number is not None and not isinstance(number, torch.SymInt):
            values[i] = operator.index(number)
    return values * n if len(values) == 1 else values


def _stride_of(stride, kernel: list[int], n: int) -> list[int]:
    """A pool's stride, which is its window's size where there is none."""
    return kernel if stride is None or (isinstance(stride, (tuple, list)) and not stride) else numbers_of(stride, n)


def conv(
    state, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, plain, transposed=False, output_padding=0
) -> Tensor:
    """F.conv1d/2d/3d and F.conv_transpose1d/2d/3d; `plain` is the namesake, called with nothing compressed."""
    n = weight.dim() - 2
    fits = compressible(input) is None and tracks(input, weight, bias) and n in (1, 2, 3) and input.dim() in (n + 1, n + 2)
    if fits and isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, numbers_of(dilation, n), numbers_of(stride, n))
    if fits and not isinstance(padding, str):
        input, weight_dtype = cast_for_weight(input, weight)
        if input.dtype == weight_dtype and input.device == weight.device:
            unbatched = input.dim() == n + 1
            x = input.unsqueeze(0) if unbatched else input
            norm = _norm_behind(state, x) if weight.requires_grad else None
            packed = NOT_KEPT if not weight.requires_grad else pack(state, x) if norm is None else state.reuse(norm)
            if packed is not None:
                window = numbers_of(stride, n), numbers_of(padding, n), numbers_of(dilation, n)
                arguments = (x, weight, bias, *window, transposed, numbers_of(output_padding, n), groups, *packed)
                ops = ops_for(x, weight, bias)
                y = ops.conv(*arguments) if norm is None else ops.conv_of_norm(*arguments, *norm.arguments)
                return y.squeeze(0) if unbatched else y
    if transposed:
        return plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return plain(input, weight, bias, stride, padding, dilation, groups)


def _norm_behind(state: LayerState, x: Tensor) -> NormOutput | None:
    """How to make `x` in the backward without keeping it; None where it must be packed."""
    norm = norm_behind(x) if state.config.compress_once else None
    return norm if norm is not None and norm.config == state.config else None


def _resolve_padding(input: Tensor, weight: Tensor, padding: str, dilation: list[int], stride: list[int]):
    """A string padding as numbers; what "same" needs more at the end of an even kernel is padded beforehand, as F.conv2d does. What the
    namesake refuses stays a string."""
    if padding == "valid":
        return input, [0] * len(dilation)
    if padding != "same" or any(s != 1 for s in stride):
        return input, padding
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        extra = [side for t in reversed(total) for side in (0, t % 2)]
        input = F.pad(input, extra)
    return input, [t // 2 for t in total]


def linear(state, input, weight, bias=None) -> Tensor:
    """F.linear on inputs of any rank."""
    if compressible(input) is None and tracks(input, weight, bias) and weight.dim() == 2:
        input, weight_dtype = cast_for_weight(input, weight)
        if input.dtype == weight_dtype and input.device == weight.device and input.shape[-1:] == weight.shape[1:]:
            x = input.unsqueeze(0) if input.dim() == 1 else input
            packed = pack(state, x) if weight.requires_grad else NOT_KEPT
            if packed is not None:
                y = ops_for(x, weight, bias).linear(x, weight, bias, *packed)
                return y.squeeze(0) if input.dim() == 1 else y
    return F.linear(input, weight, bias)


def batch_norm(state, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> Tensor:
    """F.batch_norm. With fixed statistics and a frozen weight nothing is kept."""
    fits = compressible(input) is None and tracks(input, weight, bias) and input.dim() >= 2
    if fits and _per_channel(input, running_mean, running_var, weight, bias) and (not training or input.numel() > input.shape[1]):
        needed = training or (weight is not None and weight.requires_grad)
        if not needed or saves(state, input):
            ops = ops_for(input, weight, bias, running_mean, running_var)
            y, *statistics = ops.batch_norm_forward(input, weight, bias, running_mean, running_var, training, momentum, eps)
            packed, record = state.pack_normalized(input, *statistics) if needed else (NOT_KEPT, None)
            y = ops.batch_norm(input, y, weight, bias, statistics[1], training, *packed)
            session = session_to_reuse() if state.config.compress_once and needed else None
            if session is not None and y.stride() == input.stride() and y.dtype == input.dtype:
                session.remember_norm(y, NormOutput(state.config, state, packed, record, weight, bias))
            return y
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _per_channel(input: Tensor, *tensors: Tensor | None) -> bool:
    """Whether each of `tensors` has one value for each channel of `input`."""
    shapes = [t.shape for t in tensors if t is not None]
    return shapes == [input.shape[1:2]] * len(shapes)


def clip(input, low=0.0, high=math.nan, negative_slope=0.0, inplace=False, *, plain) -> Tensor:
    """The ReLU family and F.hardtanh by an exact mask of one bit (csrc/schema.cpp); `plain()` is the namesake, called where nothing is to
    be kept."""
    if not tracks(input) or compressible(input) is not None or negative_slope < 0:
        return plain()
    if inplace and not _is_packed_order(input):
        return plain()
    ops, relu = ops_for(input), low == 0.0 and high != high
    norm = norm_behind(input) if relu else None
    if norm is None or norm.mask is not None:
        return (ops.clip_ if inplace else ops.clip)(input, low, high, negative_slope)
    if inplace:
        y, mask = input, ops.clip_and_mask_(input, low, high, negative_slope)
    else:
        y, mask = ops.clip_and_mask(input, low, high, negative_slope)
    current_session().remember_norm(y, norm._replace(mask=mask, slope=negative_slope))
    return y


def prelu(state, input, weight, *, plain) -> Tensor:
    """F.prelu by an exact mask of one bit; for the slopes' gradient the input is packed."""
    fits = compressible(input) is None and tracks(input, weight) and input.dim() > 1 and input.device == weight.device
    if not fits or weight.numel() not in (1, input.shape[1]):
        return plain()
    input, weight = lowered(input, weight)
    if input.dtype != weight.dtype:
        return plain()
    packed = pack(state, input) if weight.requires_grad else NOT_KEPT
    return plain() if packed is None else ops_for(input, weight).prelu(input, weight, *packed)


def _is_packed_order(x: Tensor) -> bool:
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def dropout(input, p=0.5, training=True, inplace=False) -> Tensor:
    """F.dropout, whose mask is kept in one bit. Without randomness (p of 0 or 1) there is nothing to keep."""
    if not training or not 0.0 < p < 1.0 or not tracks(input) or compressible(input) is not None:
        return F.dropout(input, p, training, inplace)
    y = _ops.dropout(input, p)
    return input.copy_(y) if inplace else y


def max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, *, n, plain):
    """F.max_pool1d/2d/3d by offsets within the window. 1-d pools are 2-d ones of height 1."""
    kernel = numbers_of(kernel_size, n)
    positions = 1
    for k in kernel:
        positions *= k
    fits = tracks(input) and compressible(input) is None and positions <= MAX_POOL_POSITIONS and input.dim() in (n + 1, n + 2)
    stride = _stride_of(stride, kernel, n)
    padding, dilation = numbers_of(padding, n), numbers_of(dilation, n)
    if not fits or any(len(v) != n for v in (kernel, stride, padding, dilation)):
        return plain()
    pool = _ops.max_pool_with_indices if return_indices else _ops.max_pool
    if n == 1:
        made = pool(input.unsqueeze(-2), [1, *kernel], [1, *stride], [0, *padding], [1, *dilation], ceil_mode)
        return (made[0].squeeze(-2), made[1].squeeze(-2)) if return_indices else made.squeeze(-2)
    return pool(input, kernel, stride, padding, dilation, ceil_mode)


def avg_pool(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None, *, n, plain
) -> Tensor:
    """F.avg_pool1d/2d/3d, of which only the input's shape is kept."""
    kernel = numbers_of(kernel_size, n)
    stride = _stride_of(stride, kernel, n)
    padding = numbers_of(padding, n)
    fits = tracks(input) and compressible(input) is None and input.dim() in (n + 1, n + 2)
    if not fits or any(len(v) != n for v in (kernel, stride, padding)):
        return plain()
    if n == 1:
        y = _ops.avg_pool(input.unsqueeze(-2), [1, *kernel], [1, *stride], [0, *padding], ceil_mode, count_include_pad, None)
        return y.squeeze(-2)
    return _ops.avg_pool(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool(input, output_size, *, n, plain) -> Tensor:
    """F.adaptive_avg_pool1d/2d/3d, of which only the input's shape is kept."""
    if not tracks(input) or compressible(input) is not None or input.dim() not in (n + 1, n + 2):
        return plain()
    size = numbers_of(output_size, n)
    if len(size) != n or any(s is not None and s < 0 for s in size):
        return plain()  # the namesake's error
    size = [input.shape[d - n] if s is None else s for d, s in enumerate(size)]
    if all(s == 1 for s in size):
        return plain()  # a mean: keeps nothing
    if n == 1:
        return _ops.adaptive_avg_pool(input.unsqueeze(-2), [1, *size]).squeeze(-2)
    return _ops.adaptive_avg_pool(input, size)


def pad(input, pad, mode="constant", value=None) -> Tensor:
    """F.pad. Reflection and replication keep their input for the backward, which reads no more of it than its shape."""
    spatial = len(pad) // 2
    fits = mode in ("reflect", "replicate") and len(pad) in (2, 4, 6) and input.dim() in (spatial + 1, spatial + 2)
    if not fits or not tracks(input) or compressible(input) is not None:
        return F.pad(input, pad, mode, value)
    return _ops.pad(input, pad, mode)


def mul(state, input, gate, inplace=False, *, plain) -> Tensor:
    """input * gate where the gate is broadcast over the input (squeeze-and-excitation, layer scales): the input, which the gate's
    gradient needs, is packed. `state` is called where there is something to pack."""
    if not isinstance(gate, Tensor) or not isinstance(input, Tensor) or not tracks(gate):
        return plain()
    dtype = torch.result_type(input, gate)
    if input.device != gate.device or gate.is_nested or (input.dtype != gate.dtype and (inplace or gate.dim() == 0)):
        return plain()
    if compressible(input) is not None or dtype not in FLOATS or stored(gate) >= input.numel():
        return plain()
    if gate.dim() > input.dim() or any(g not in (1, n) for g, n in zip(gate.shape[::-1], input.shape[::-1], strict=False)):
        return plain()
    input, gate = input.to(dtype), gate.to(dtype)
    packed = pack(state(), input, is_norm=True)
    if packed is None:
        return plain()
    ops = ops_for(input, gate)
    return ops.mul_(input, gate, *packed) if inplace else ops.mul(input, gate, *packed)


def stored(x: Tensor) -> int:
    """Elements of `x` in memory: an expanded tensor repeats them."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def smooth(state, input, function, inplace=False, *, plain) -> Tensor:
    """F.silu, F.hardswish, F.mish, F.gelu and others by their packed derivative; `function` as in csrc/schema.cpp."""
    if not tracks(input) or compressible(input) is not None:
        return plain()
    layer, ops = state(), ops_for(input)
    if not saves(layer, input):
        return plain()
    packed = layer.pack_derivative(input.detach(), function)
    return ops.smooth_(input, function, *packed) if inplace else ops.smooth(input, function, *packed)
