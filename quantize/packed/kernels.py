"""Which packed layers run on their codes, and how: the way from a layer to the ops of csrc/packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import levels_table, storage_bits
from .panels import panels, sums

FLOAT_ROWS = 4  # float inputs of more rows are faster through the decoded weight and a matrix product
FEWEST_INPUTS, FEWEST_OUTPUTS = 4, 8  # of a group: with fewer, most of a panel of 16 x 4 would be filling
LONGEST = 2**31 // (255 * 127)  # products that an int32 sum holds in any case


def reason(layer) -> str:
    """Why `layer` runs on a decoded float weight; empty where a kernel reads its codes."""
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


def run(layer, input: Tensor) -> Tensor | None:
    """`layer` on its float input by a kernel, or None where none takes it."""
    if input.dtype != torch.float32 or not input.numel() or (torch.is_grad_enabled() and input.requires_grad) or reason(layer):
        return None
    if layer.spatial == 0:
        return _linear(layer, input)
    if input.dim() not in (layer.spatial + 1, layer.spatial + 2) or input.shape[-layer.spatial - 1] != layer.in_channels:
        return None  # the float layer's own error says it best
    return _conv(layer, input)


def _weight(layer) -> tuple[Tensor, Tensor, Tensor]:
    """(panels, sums, levels), made at the first use: beside the codes, as many bytes again."""
    key = (id(layer.codes), layer.codes._version)
    found = layer.__dict__.get("_panels")
    if found is None or found[0] != key:
        width, k = storage_bits(layer.bits), _length(layer)
        channels = layer.shape[1]
        made = panels(layer.codes, width, k // channels, channels, getattr(layer, "groups", 1))
        table = levels_table(layer.method, width).to(layer.codes.device)
        found = key, (made, sums(layer.codes, layer.method, layer.bits, k), table)
        layer.__dict__["_panels"] = found
    return found[1]


def _bias(layer) -> Tensor | None:
    return None if layer.bias is None else layer.bias.float()


def _linear(layer, input: Tensor) -> Tensor | None:
    if input.shape[-1] != layer.in_features:
        return None
    rows, width = input.reshape(-1, layer.in_features), storage_bits(layer.bits)
    if layer.activation_bits is None:
        if len(rows) > FLOAT_ROWS or (width == 8 and layer.method != "uniform"):
            return None
        made, _, levels = _weight(layer)
        out = torch.ops.quantize.packed_linear_float(rows, layer.codes, made, levels, layer.scales, _bias(layer), width)
    else:
        made, total, levels = _weight(layer)
        out = torch.ops.quantize.packed_linear(
            rows, layer.step, layer.zero_point, layer.activation_bits, layer.codes, made, levels, layer.scales, total, _bias(layer), width
        )
    return out.view(*input.shape[:-1], -1)


def _conv(layer, input: Tensor) -> Tensor:
    made, total, levels = _weight(layer)
    padding = _symmetric_padding(layer)
    if padding is None:
        mode = {} if layer.padding_mode == "zeros" else {"mode": layer.padding_mode}
        input, padding = F.pad(input, layer._reversed_padding_repeated_twice, **mode), (0,) * layer.spatial
    batched = input.dim() == layer.spatial + 2
    x = input if batched else input.unsqueeze(0)
    geometry = [layer.kernel_size, layer.stride, padding, layer.dilation]
    if layer.spatial == 1:  # an image of one line
        x = x.unsqueeze(2)
        geometry = [(1, *kernel) if part != 2 else (0, *kernel) for part, kernel in enumerate(geometry)]
    out = torch.ops.quantize.packed_conv2d(
        x, layer.step, layer.zero_point, layer.activation_bits, layer.codes, made, levels, layer.scales, total, _bias(layer),
        storage_bits(layer.bits), *map(list, geometry), layer.groups,
    )  # fmt: skip
    out = out.squeeze(2) if layer.spatial == 1 else out
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
