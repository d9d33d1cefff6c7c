"""Which packed layers run on their codes, and how: the way from a layer to the ops of csrc/packed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..inputs import raise_named
from .binary_panels import binary_panels, plane_panels, tap_sums
from .form import GROUPED
from .grid import SignGrid
from .layout import storage_bits
from .panels import integers, panels, sums, tap_levels
from .pending import Pending
from .thresholds import HALF, of_products

FLOAT_ROWS = 4  # float inputs of more rows are faster through the decoded weight and a matrix product
FEWEST_INPUTS, FEWEST_OUTPUTS = 4, 8  # of a group: with fewer, most of a panel of 16 x 4 would be filling
PLANNED = ("codes", "scales", "bias", "step", "zero_point", "threshold", "flip")  # what the ops are given of a layer
USED = (*PLANNED, "group_bits")
MOST_TAPS = 2**24 // (255 * 127)  # of a depthwise convolution: products that a float32 sum holds in any case
LONGEST, LONGEST_SIGNS = 2**31 // (255 * 128), 2**30 - 1  # products that an int32 sum holds in any case


def reason(layer) -> str:
    """Why `layer` runs on a decoded float weight; empty where a kernel reads its codes."""
    if layer.method == GROUPED:
        return f"decoded at each use from {8 if layer.bits <= 8 else 16}-bit codes: groups have bits of their own"
    if layer.transposed:
        return "decoded at each use: transposed"
    if layer.spatial == 3:
        return "decoded at each use: three dimensions"
    signs = isinstance(layer.grid, SignGrid)
    if layer.scales.numel() == 0 or _length(layer) > (LONGEST_SIGNS if signs else LONGEST):
        return "decoded at each use: too many inputs for 32-bit sums"
    if signs:
        apart = layer.spatial > 0 and layer.padding_mode == "zeros" and _symmetric_padding(layer) is None
        return "decoded at each use: zeros on one side, which have no sign" if apart else ""
    if layer.activation_bits is None and layer.spatial > 0:
        return "decoded at each use: float inputs"
    if max(layer.activation_bits or 0, layer.bits) > 8:
        return "decoded at each use: beyond 8 bits"
    large = layer.method == "power_of_two" and storage_bits(layer.bits) == 8
    halves = layer.method == "dorefa" and layer.bits == 8  # takes a sum of inputs that only the plain case has
    if large or (halves and (layer.activation_bits is None or getattr(layer, "groups", 1) > 1)):
        return f"decoded at each use: levels of {layer.method} at {layer.bits} bits are beyond 8-bit integers"
    if layer.activation_bits is None:
        return ""
    outputs, inputs = (layer.out_features, layer.in_features) if layer.spatial == 0 else (layer.out_channels, layer.in_channels)
    groups = getattr(layer, "groups", 1)
    few = groups > 1 and (inputs // groups < FEWEST_INPUTS or outputs // groups < FEWEST_OUTPUTS)
    if few and not _depthwise(layer):
        return f"decoded at each use: groups of {inputs // groups} to {outputs // groups} channels"
    return ""


def _length(layer) -> int:
    return math.prod(layer.shape[1:])


class _Plan(NamedTuple):
    """What a layer's calls have in common, made at the first one: beside the codes, as many bytes again."""

    reason: str
    call: Callable[[Tensor], Tensor] | None = None  # the op, from floats to floats
    pad: list[int] | None = None  # around the input before the op
    floats: bool = False  # inputs are not quantized
    half: Tensor | None = None  # scales of the sum of inputs that the op's last channel is (panels.py, Integers.ones)
    bits: dict[tuple[bool, bool], Callable] | None = None  # of binary layers: the op by whether bits come in, and go out
    chained: bool = False  # whether the op gives codes, and clips and adds
    grid: tuple | None = None  # step, zero point and bits of the codes that it takes


def table(layer) -> Tensor:
    """Form.table of the layer's tensors."""
    return _kept(layer, "_table", lambda layer: layer.form.table(layer._buffers))


def _kept(layer, name: str, make: Callable, then: Callable | None = None):
    """What `make` makes of `layer`, from its buffers and those of the layer that it feeds: at the first use, and again when they have
    changed. `then` is told when something is kept: then(layer, what was made, the watch over the buffers)."""
    if torch.compiler.is_compiling():  # what changes cannot be traced
        return make(layer)
    kept = layer.__dict__.get(name)
    if kept is not None and kept[0].unchanged():
        return kept[1]
    if _C.in_transform():  # fake tensors and wrapped ones must not outlive it
        return make(layer)
    buffers = [(layer._buffers, part, layer._buffers.get(part)) for part in USED]
    if layer._next is not None:
        buffers += [(layer._next._buffers, part, layer._next._buffers[part]) for part in ("threshold", "flip")]
    watch, made = _C.Watch([entry for entry in buffers if entry[2] is not None]), _untraced(make, layer)
    layer.__dict__[name] = (watch, made)
    if then is not None:
        then(layer, made, watch)
    return made


def _untraced(make: Callable, layer):
    """make(layer), as a constant of what torch.jit.trace records: its second run, which it compares, finds it made."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return make(layer)
    finally:
        torch._C._set_tracing_state(state)


def _keep_usual_call(layer, plan: _Plan, watch) -> None:
    layer.__dict__["_call"] = _usual_call(layer, plan, watch)


def _usual_call(layer, plan: _Plan, watch) -> Callable[[Tensor], Tensor | Pending | None] | None:
    """What run() does with the input that a layer usually has, without Python in between."""
    if plan.reason or plan.pad is not None or plan.half is not None or layer.spatial == 1:
        return None
    dims, axis, channels = (2, 1, layer.in_features) if layer.spatial == 0 else (4, 1, layer.in_channels)
    if plan.bits is None:
        call = _C.Call(watch, _pending(layer) if plan.chained else None, layer._region)
        call.add(torch.float32, dims, axis, channels, plan.call, *([FLOAT_ROWS] if plan.floats else ()))
        return call
    bits_out = (False, True) in plan.bits
    call = _C.Call(watch, _pending(layer), layer._region)
    call.add(torch.float32, dims, axis, channels, plan.bits[False, bits_out])
    if layer._fed:
        call.add(torch.uint8, dims, dims - 1, -(-channels // 64) * 8, plan.bits[True, bits_out])
    return call


def run(layer, input: Tensor) -> Tensor | None:
    """`layer` on its float input by a kernel, or None where none takes it."""
    if not input.numel() or not value_only(input):
        return None
    if input.dtype != torch.float32 and not (layer._fed and input.dtype == torch.uint8):
        return None
    plan = _kept(layer, "_plan", _make_plan, _keep_usual_call)
    if plan.reason:
        return None
    if plan.bits is not None:
        return _binary(layer, plan, input)
    out = _linear(layer, plan, input) if layer.spatial == 0 else _conv(layer, plan, input)
    if plan.half is None or out is None:
        return out
    channel = 1 - layer.spatial - 2 if layer.spatial else -1
    return out.narrow(channel, 0, layer.scales.numel()).addcmul(out.narrow(channel, -1, 1), plan.half)


def run_chain(layer, pending: Pending) -> Tensor | Pending | None:
    """`layer` on the codes of what comes, or None where it must be floats."""
    kept = layer.__dict__.get("_plan")
    plan = kept[1] if kept is not None and kept[0].unchanged() else _kept(layer, "_plan", _make_plan, _keep_usual_call)
    codes = None if plan.grid is None else pending.codes(*plan.grid)
    if codes is None:
        return None
    if layer.awaits():
        return Pending(plan.call, codes, layer._steps, layer)
    try:
        return plan.call(codes)
    except Exception as error:
        raise_named(error, layer, codes, handed_on=True)


def _pending(layer) -> Callable[[Callable, Tensor], Pending] | None:
    steps, owner = layer._steps, weakref.ref(layer)  # which keeps what is made here
    return (lambda call, x: Pending(call, x, steps, owner())) if steps else None


def value_only(input: Tensor) -> bool:
    """Whether nobody asks for a derivative by `input`, of which the kernels have none, and no transform of torch.func is active.

    What torch.jit.trace records is for inference: it traces again without gradients, and compares.
    """
    if torch.compiler.is_compiling():
        return not (input.requires_grad and torch.is_grad_enabled())
    return _C.value_only(input) or (torch._C._get_tracing_state() is not None and not _C.in_transform())


def _bound(op: str, arguments: tuple) -> Callable[[Tensor], Tensor]:
    """The op with all its arguments but the first."""
    if torch.compiler.is_compiling():
        traced = getattr(torch.ops.quantize, op).default
        return lambda x: traced(x, *arguments)
    return _C.BoundOp(f"quantize::{op}", arguments)


def _make_plan(layer) -> _Plan:
    why = reason(layer)
    if why:
        return _Plan(why)
    if layer.activation_bits is None and torch.compiler.is_compiling():
        return _Plan("decoded when compiled: its kernel is for few rows, whose number would be compiled in")
    buffers = [layer._buffers[part] for part in PLANNED]
    codes, scales, bias, step, zero_point, threshold, flip = (None if t is None else t.contiguous() for t in buffers)
    length, channels = _length(layer), layer.shape[1]
    taps, groups = length // channels, getattr(layer, "groups", 1)
    geometry, pad = ((), None) if layer.spatial == 0 else _geometry(layer)
    if isinstance(layer.grid, SignGrid):
        unit = layer.grid.kind == "unit"
        if unit and threshold is None:
            threshold, flip = _above_half(channels * groups, codes.device)
        weight = (unit, codes, _cpu_only(binary_panels, codes, length, groups), tap_sums(codes, taps, channels), scales, bias)
        op, rest = ("packed_binary_conv2d", (channels * groups, *geometry, None)) if geometry else ("packed_binary_linear", (channels,))
        following, inputs, outputs = _following(layer), {False: (threshold, flip), True: (None, None)}, {False: (None, None)}
        if following is not None:
            outputs[True] = following
        calls = {
            (bits_in, bits_out): _bound(op, (*before, *weight, *behind, *rest))
            for bits_in, before in inputs.items()
            for bits_out, behind in outputs.items()
        }
        return _Plan("", pad=pad, bits=calls)
    weight, half = integers(codes, layer.method, layer.bits, length), None
    if layer.activation_bits is None:
        made = _cpu_only(panels, weight.codes, weight.width, taps, channels, groups)
        return _Plan("", _bound("packed_linear_float", (weight.codes, made, weight.levels, scales, bias, weight.width)), floats=True)
    if weight.ones:
        half = scales.view(-1, *[1] * layer.spatial)
        scales = torch.cat([2 * scales, scales.new_ones(1)])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(1)])
    planes = _in_bit_planes(layer)
    if geometry and _depthwise(layer):
        made = tap_levels(weight, taps, layer.in_channels)
    elif planes:
        made = plane_panels(codes, layer.bits, length, groups)
    else:
        made = _cpu_only(panels, weight.codes, weight.width, taps, channels, groups)
    arguments = (
        step, zero_point, layer.activation_bits, weight.codes, made, weight.levels, scales, sums(weight, length), bias, weight.width,
    )  # fmt: skip
    chained = layer.spatial == 2 and half is None and not planes and codes.device.type == "cpu" and not torch.compiler.is_compiling()
    grid = (step, zero_point, layer.activation_bits) if chained and pad is None else None
    return _Plan(
        "", _bound("packed_conv2d" if geometry else "packed_linear", (*arguments, *geometry)), pad, False, half, None, chained, grid
    )


def _cpu_only(make: Callable[..., Tensor], codes: Tensor, *sizes: int) -> Tensor:
    """What `make` makes of the codes for the CPU's kernels; a GPU's read the codes themselves, and are spared the memory."""
    return codes.new_empty(0) if codes.is_cuda else make(codes, *sizes)


def _depthwise(layer) -> bool:
    """Whether each group has one input channel, whose taps csrc/packed/depthwise.h multiplies in vectors. A GPU would not gain."""
    return layer.spatial > 0 and layer.groups == layer.in_channels > 1 and layer.codes.device.type == "cpu" and _length(layer) <= MOST_TAPS


def _in_bit_planes(layer) -> bool:
    """Whether two products of bits (csrc/packed/bit_planes.h) are faster than one of bytes, which they are where bytes have no dot product
    of their own."""
    if torch.compiler.is_compiling() or layer.codes.device.type != "cpu" or _C.cpu_isa() != "avx2":
        return False
    signs = layer.method in ("xnor", "dorefa") and layer.bits * layer.activation_bits == 2
    return signs and layer.spatial > 0 and layer.shape[1] % 4 == 0 and float(layer.zero_point) == 0


def _geometry(layer) -> tuple[tuple, list[int] | None]:
    """Kernel, stride, padding, dilation, groups of an image; and what must be put around the input before."""
    padding = _symmetric_padding(layer)
    pad = None if padding is not None else layer._reversed_padding_repeated_twice
    geometry = [layer.kernel_size, layer.stride, padding or (0,) * layer.spatial, layer.dilation]
    if layer.spatial == 1:  # an image of one line
        geometry = [(1, *kernel) if part != 2 else (0, *kernel) for part, kernel in enumerate(geometry)]
    return (*map(list, geometry), layer.groups), pad


def _above_half(channels: int, device) -> tuple[Tensor, Tensor]:
    """The threshold of DoReFa's 1-bit activations."""
    half = torch.full((channels,), HALF, dtype=torch.float32, device=device)
    return torch.nextafter(half, half.new_tensor(torch.inf)), torch.ones(channels, dtype=torch.uint8, device=device)


def _linear(layer, plan: _Plan, input: Tensor) -> Tensor | None:
    if input.shape[-1] != layer.in_features:
        return None  # the float layer's own error says it best
    rows = input if input.dim() == 2 else input.reshape(-1, layer.in_features)
    if plan.floats and rows.shape[0] > FLOAT_ROWS:
        return None
    out = plan.call(rows)
    return out if rows is input else out.view(*input.shape[:-1], -1)


def _conv(layer, plan: _Plan, input: Tensor) -> Tensor | None:
    x = _image(layer, plan, input)
    if x is None:
        return None
    if plan.chained and input.dim() == 4 and layer.awaits() and torch._C._get_tracing_state() is None:
        return Pending(plan.call, x, layer._steps, layer)
    return _like(input, layer, plan.call(x))


def _image(layer, plan: _Plan, input: Tensor) -> Tensor | None:
    """`input` as [N, C, H, W], padded where the op does not; None where it does not fit the layer."""
    spatial = layer.spatial
    batched = input.dim() == spatial + 2
    if not (batched or input.dim() == spatial + 1) or input.shape[-spatial - 1] != layer.in_channels:
        return None
    if plan.pad is not None:
        input = F.pad(input, plan.pad, **({} if layer.padding_mode == "zeros" else {"mode": layer.padding_mode}))
    x = input if batched else input.unsqueeze(0)
    return x.unsqueeze(2) if spatial == 1 else x


def _like(input: Tensor, layer, out: Tensor) -> Tensor:
    """An op's output with the dimensions that `input` has."""
    out = out.squeeze(2) if layer.spatial == 1 else out
    return out if input.dim() == layer.spatial + 2 else out.squeeze(0)


def _binary(layer, plan: _Plan, input: Tensor) -> Tensor | None:
    bits_in, bits_out = input.dtype == torch.uint8, _hands_bits_on(layer, plan)
    call = plan.bits[bits_in, bits_out]
    if layer.spatial == 0:
        if not bits_in and input.shape[-1] != layer.in_features:
            return None
        out = call(input if input.dim() == 2 else input.reshape(-1, input.shape[-1]))
        return out if input.dim() == 2 else out.view(*input.shape[:-1], -1)
    x = input if bits_in else _image(layer, plan, input)
    if x is None:
        return None
    if not torch.compiler.is_compiling() and (bits_in or input.dim() == 4) and layer.awaits():
        return Pending(call, x, layer._steps, layer)
    return call(x) if bits_in or bits_out else _like(input, layer, call(x))


def _hands_bits_on(layer, plan: _Plan) -> bool:
    return layer._next is not None and (False, True) in plan.bits and not layer.watched() and layer._region.is_entered()


def _following(layer) -> tuple[Tensor, Tensor] | None:
    """Thresholds of the products that make them the next layer's bits; None where that takes floats."""
    other = layer._next
    if other is None or torch.compiler.is_compiling() or reason(other) or (other.spatial > 0 and _symmetric_padding(other) is None):
        return None
    if other.codes.device != layer.codes.device or layer.codes.is_meta:  # replicas, layers spread over devices; no values to search
        return None
    threshold, flip = other._buffers["threshold"], other._buffers["flip"]
    if threshold is None and other.grid.kind == "unit":
        threshold, flip = _above_half(layer.scales.numel(), layer.scales.device)
    elif threshold is None:
        threshold, flip = torch.zeros_like(layer.scales), torch.zeros_like(layer.scales, dtype=torch.uint8)
    return of_products(layer.scales, layer.bias, threshold, flip, _length(layer))


def _symmetric_padding(layer) -> tuple[int, ...] | None:
    """Zeros that the kernel can put around the image itself; None where the input must be padded first."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        return layer.padding
    around = layer._reversed_padding_repeated_twice[::-1]  # (after, before) of each dimension, the first first
    pairs = list(zip(around[::2], around[1::2], strict=True))
    return tuple(a for a, _ in pairs) if all(a == b for a, b in pairs) else None
