"""Which packed layers run on their codes, and how: the way from a layer to the ops of csrc/packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import GROUPED
from .layout import levels_table, storage_bits
from .panels import panels, sums

FLOAT_ROWS = 4  # float inputs of more rows are faster through the decoded weight and a matrix product
FEWEST_INPUTS, FEWEST_OUTPUTS = 4, 8  # of a group: with fewer, most of a panel of 16 x 4 would be filling
PLANNED = ("codes", "scales", "bias", "step", "zero_point")  # what the ops are given of a layer
LONGEST = 2**31 // (255 * 127)  # products that an int32 sum holds in any case


def reason(layer) -> str:
    """Why `layer` runs on a decoded float weight; empty where a kernel reads its codes."""
    if layer.method == GROUPED:
        return f"decoded at each use from {8 if layer.bits <= 8 else 16}-bit codes: groups have bits of their own"
    if layer.transposed:
        return "decoded at each use: transposed"
    if layer.spatial == 3:
        return "decoded at each use: three dimensions"
    if layer.activation_bits is None:
        return "" if layer.spatial == 0 else "decoded at each use: float inputs"
    if storage_bits(layer.bits) == 8 and layer.method != "uniform":
        return f"decoded at each use: levels of {layer.method} at {layer.bits} bits are beyond 8-bit integers"
    outputs, inputs = (layer.out_features, layer.in_features) if layer.spatial == 0 else (layer.out_channels, layer.in_channels)
    groups = getattr(layer, "groups", 1)
    if groups > 1 and (inputs // groups < FEWEST_INPUTS or outputs // groups < FEWEST_OUTPUTS):
        return f"decoded at each use: groups of {inputs // groups} to {outputs // groups} channels"
    if layer.scales.numel() == 0 or _length(layer) > LONGEST:
        return "decoded at each use: too many inputs for 32-bit sums"
    return ""


def _length(layer) -> int:
    length = 1
    for size in layer.shape[1:]:
        length *= size
    return length


class _Plan(NamedTuple):
    """What a layer's calls have in common, made at the first one: beside the codes, as many bytes again."""

    reason: str
    arguments: tuple  # of the op, from the codes to the storage bits
    geometry: tuple  # of packed_conv2d; None: linear
    pad: list[int] | None  # around the input before the op


def table(layer) -> Tensor:
    """Form.table of the layer's tensors."""
    return _kept(layer, "_table", layer.form.parts, lambda: layer.form.table(layer._buffers))


def _kept(layer, name: str, parts: tuple[str, ...], make: Callable):
    """What `make` makes of the buffers `parts`: at the first use, and again when they have changed."""
    if torch.compiler.is_compiling():  # versions cannot be traced
        return make()
    buffers, kept = layer._buffers, layer.__dict__.get(name)
    if kept is not None:
        for part, tensor, version in kept[0]:
            if buffers[part] is not tensor or (version is not None and tensor._version != version):
                break
        else:
            return kept[1]
    tensors = [(part, buffers[part]) for part in parts]
    made_of = [(part, t, None if t is None or t.is_inference() else t._version) for part, t in tensors]
    kept = layer.__dict__[name] = (made_of, make())
    return kept[1]


def run(layer, input: Tensor) -> Tensor | None:
    """`layer` on its float input by a kernel, or None where none takes it."""
    if layer.method == GROUPED or input.dtype != torch.float32 or not input.numel() or (torch.is_grad_enabled() and input.requires_grad):
        return None
    plan = _plan(layer)
    if plan.reason:
        return None
    return _linear(layer, plan, input) if layer.spatial == 0 else _conv(layer, plan, input)


def _plan(layer) -> _Plan:
    return _kept(layer, "_plan", PLANNED, lambda: _make_plan(layer))


def _make_plan(layer) -> _Plan:
    codes, scales, bias, step, zero_point = (layer._buffers[part] for part in PLANNED)
    why, width = reason(layer), storage_bits(layer.bits)
    if not why and width == 8 and layer.method != "uniform":
        why = "levels beyond 8-bit integers"
    if why:
        return _Plan(why, (), None, None)
    length, channels = _length(layer), layer.shape[1]
    made = panels(codes, width, length // channels, channels, getattr(layer, "groups", 1))
    levels = levels_table(layer.method, width).to(codes.device)
    if layer.activation_bits is None:
        return _Plan("", (codes, made, levels, scales, bias, width), None, None)
    total = sums(codes, layer.method, layer.bits, length)
    arguments = (step, zero_point, layer.activation_bits, codes, made, levels, scales, total, bias, width)
    if layer.spatial == 0:
        return _Plan("", arguments, None, None)
    padding = _symmetric_padding(layer)
    pad = None if padding is not None else layer._reversed_padding_repeated_twice
    geometry = [layer.kernel_size, layer.stride, padding or (0,) * layer.spatial, layer.dilation]
    if layer.spatial == 1:  # an image of one line
        geometry = [(1, *kernel) if part != 2 else (0, *kernel) for part, kernel in enumerate(geometry)]
    return _Plan("", arguments, (*map(list, geometry), layer.groups), pad)


def _linear(layer, plan: _Plan, input: Tensor) -> Tensor | None:
    if input.shape[-1] != layer.in_features:
        return None  # the float layer's own error says it best
    rows = input if input.dim() == 2 else input.reshape(-1, layer.in_features)
    if layer.activation_bits is not None:
        out = torch.ops.quantize.packed_linear.default(rows, *plan.arguments)
    elif len(rows) <= FLOAT_ROWS:
        out = torch.ops.quantize.packed_linear_float.default(rows, *plan.arguments)
    else:
        return None
    return out if input.dim() == 2 else out.view(*input.shape[:-1], -1)


def _conv(layer, plan: _Plan, input: Tensor) -> Tensor | None:
    spatial = layer.spatial
    batched = input.dim() == spatial + 2
    if not (batched or input.dim() == spatial + 1) or input.shape[-spatial - 1] != layer.in_channels:
        return None
    if plan.pad is not None:
        input = F.pad(input, plan.pad, **({} if layer.padding_mode == "zeros" else {"mode": layer.padding_mode}))
    x = input if batched else input.unsqueeze(0)
    x = x.unsqueeze(2) if spatial == 1 else x
    out = torch.ops.quantize.packed_conv2d.default(x, *plan.arguments, *plan.geometry)
    out = out.squeeze(2) if spatial == 1 else out
    return out if batched else out.squeeze(0)


def _symmetric_padding(layer) -> tuple[int, ...] | None:
    """Zeros that the kernel can put around the image itself; None where the input must be padded first."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        return layer.padding
    around = layer._reversed_padding_repeated_twice[::-1]  # (after, before) of each dimension, the first first
    pairs = list(zip(around[::2], around[1::2], strict=True))
    return tuple(a for a, _ in pairs) if all(a == b for a, b in pairs) else None
