"""What a model costs to run: multiply-accumulates and bit operations, beside its bits and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calls import arguments
from ..table import aligned, bits_text, kib, short_count
from ..weight.prepare import prepared_weights
from .contents import input_grid, packed_weights
from .kernels import reason
from .modules import PACKED, PackedLayer
from .plain import kind_of, refuse_wrappers, shell
from .replace import reason_decoded
from .size_report import dtype_bits, report_of
from .weight import is_transposed

COUNTED = (*PACKED, nn.MultiheadAttention, PackedLayer)
UNCOUNTED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


class LayerSummary(NamedTuple):
    """One row. `macs` of all calls together; `bit_ops` = macs * weight_bits * activation_bits; `bytes` as save() stores them.

    `weight_bits`: a float, the average over the weights, where groups have bits of their own.
    """

    name: str
    kind: str
    weight_bits: float
    activation_bits: int
    macs: int
    bit_ops: int
    bytes: int
    note: str


class Summary:
    """What :func:`summary` returns; printing it gives a table.

    Attributes:
        layers: list of LayerSummary (name, kind, weight_bits, activation_bits, macs, bit_ops, bytes, note) in module order. What has no
            multiply-accumulates (norms, embeddings, ...) is one row at the end, "others".
        macs, bit_ops, bytes: totals.
        float_bytes: bytes of the float model's state.
    """

    def __init__(self, layers: list[LayerSummary], float_bytes: int):
        self.layers, self.float_bytes = layers, float_bytes
        self.macs, self.bit_ops, self.bytes = (sum(getattr(row, field) for row in layers) for field in ("macs", "bit_ops", "bytes"))

    def __str__(self):
        rows = [
            (
                r.name,
                r.kind,
                bits_text(r.weight_bits),
                str(r.activation_bits),
                short_count(r.macs),
                short_count(r.bit_ops),
                kib(r.bytes),
                r.note,
            )
            for r in self.layers
        ]
        header = ("layer", "kind", "weight bits", "activation bits", "MACs", "bit operations", "KiB", "note")
        return (
            f"{aligned(header, rows, '<<>>>>><')}\n{short_count(self.macs)} MACs, {short_count(self.bit_ops)} bit operations, "
            f"{kib(self.bytes)} KiB; the float model: {short_count(1024 * self.macs)} bit operations, {kib(self.float_bytes)} KiB"
        )

    def __repr__(self):
        totals = f"macs={self.macs}, bit_ops={self.bit_ops}, bytes={self.bytes}"
        return f"Summary({totals}, layers=[{len(self.layers)} rows])"


def summary(model: nn.Module, *inputs) -> Summary:
    """Runs ``model(*inputs)`` in evaluation on a copy and reports what each layer costs. Nothing of the model changes.

    Counted are the calls of convolutions (transposed ones too), linear layers and nn.MultiheadAttention, whose products of queries, keys
    and values are a row of their own; functional calls are not. Floats count with their own bits, 32 for float32.

    Args:
        model: a float, prepared or converted model.
        inputs: its positional arguments; a mapping alone: its arguments by name.

    Returns:
        Summary: the totals, and a row for each layer.

    Raises:
        TypeError: `model` is no nn.Module or a wrapper around it.
        ValueError: a prepared weight is NaN or infinite.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), quantize.Uniform(4, activation_bits=8))
        >>> report = quantize.summary(model, torch.randn(1, 3, 10, 10))
        >>> report.macs, report.bit_ops  # 8 * 8 * 8 outputs of 27 products; times 4 times 8
        (13824, 442368)

    Source: bit operations as in UNIQ, arXiv 1804.10969, section 4.3, without accumulation.
    """
    refuse_wrappers(model, "summary")
    sizes, stored_bits = Counter(), {}
    report = report_of(model, "summary")
    for row in report.layers:  # a layer's packed weight first
        sizes[row.name] += row.bytes
        stored_bits.setdefault(row.name, row.bits)
    macs, products, seen_bits = count_macs(model, *arguments(model, inputs))
    prepared = {w.module for w in prepared_weights(model)}
    rows, out_projections = [], {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if not isinstance(module, COUNTED):
            continue
        quantized = module in prepared or isinstance(module, PackedLayer) or bool(packed_weights(module))
        weight_bits = stored_bits[name] if quantized else _float_bits(module)
        activation_bits = _activation_bits(module) or seen_bits.get(name, 32)
        count = macs[name]
        note = _note(module, quantized, module in prepared, called=name in seen_bits or module in out_projections)
        kind, bit_ops = kind_of(module), round(count * weight_bits * activation_bits)
        rows.append(LayerSummary(name, kind, weight_bits, activation_bits, count, bit_ops, sizes.pop(name, 0), note))
        if products[name]:
            bits = seen_bits[name]
            rows.append(
                LayerSummary(name, "attention", bits, bits, products[name], products[name] * bits * bits, 0, "products of activations")
            )
    unknown = [name for name, module in model.named_modules() if isinstance(module, UNCOUNTED)]
    if sizes or unknown:
        note = f"MACs not counted: {', '.join(unknown)}" if unknown else ""
        rows.append(LayerSummary("others", "", 32, 32, 0, 0, sum(sizes.values()), note))
    return Summary(rows, report.float_bytes)


@torch.no_grad()
def count_macs(model: nn.Module, args: tuple, kwargs: Mapping = MappingProxyType({})) -> tuple[Counter, Counter, dict[str, int]]:
    """MACs with weights, MACs among activations, and bits of the input, by layer name."""
    macs, products, bits = Counter(), Counter(), {}
    copied = shell(model, "summary").eval()  # whose hooks see floats: what is watched hands no bits on (kernels.py)
    for name, module in copied.named_modules():
        if isinstance(module, nn.MultiheadAttention):

            def count_attention(module, args, kwargs, output, name=name):
                projections, out, attention = _attention_macs(module, args, kwargs)
                inner = f"{name}.out_proj" if name else "out_proj"
                macs[name] += projections
                macs[inner] += out
                products[name] += attention
                bits[name] = bits[inner] = dtype_bits(args[0] if args else kwargs["query"])

            module.register_forward_hook(count_attention, with_kwargs=True)
        elif isinstance(module, COUNTED):

            def count_layer(module, args, kwargs, output, name=name):
                input = args[0] if args else kwargs["input"]
                macs[name] += _layer_macs(module, input, output)
                bits[name] = dtype_bits(input)

            module.register_forward_hook(count_layer, with_kwargs=True)
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))  # in-place layers write into their input
        copied(*args, **kwargs)
    return macs, products, bits


def _layer_macs(module: nn.Module, input: Tensor, output: Tensor) -> int:
    if is_transposed(module):  # every input element meets all weights of its channel
        return input.numel() * math.prod(module.kernel_size) * (module.out_channels // module.groups)
    if hasattr(module, "kernel_size"):
        return output.numel() * math.prod(module.kernel_size) * (module.in_channels // module.groups)
    return output.numel() * module.in_features


def _attention_macs(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[int, int, int]:
    """(input projections, output projection, products of activations)."""
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
    width = module.embed_dim
    keys = key.shape[1 if module.batch_first and key.dim() == 3 else 0]
    projections = query.numel() * width + key.numel() * width + value.numel() * width
    return projections, query.numel() * width, 2 * query.numel() * keys


def _float_bits(module: nn.Module) -> int:
    weight = getattr(module, "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight", None)
    return dtype_bits(weight if weight is not None else module.q_proj_weight)


def _activation_bits(module: nn.Module) -> int | None:
    """Of a quantized input; None where it is float."""
    if isinstance(module, PackedLayer):
        return module.activation_bits
    own = module._modules.get("activation_quantizer")
    return getattr(own, "bits", None)


def _note(module: nn.Module, quantized: bool, prepared: bool, called: bool) -> str:
    notes = []
    if quantized:
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        channels = weight.detach().movedim(1, 0) if is_transposed(module) else weight.detach()
        zero = int((channels == 0).flatten(1).all(1).sum())
        if zero:
            notes.append(f"{zero} of {len(channels)} channels are all zero")
    if prepared:
        notes.append("prepared: runs in full precision")
    elif isinstance(module, PackedLayer):
        notes.append(reason(module))
    elif input_grid(module) is not None or packed_weights(module):
        notes.append(reason_decoded(module))
    if not called:
        notes.append("not called")
    return "; ".join(note for note in notes if note)
