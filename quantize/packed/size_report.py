"""How many bytes a model takes, layer by layer, in the file that save() writes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..copies import copy_of
from ..table import aligned, bits_text, kib
from ..weight.prepare import prepared_weights
from .contents import Item, contents, join, own_tensors, packed_parts, packed_weights
from .convert import converted
from .fold import BATCH_NORMS
from .form import GROUPED
from .modules import PACKED, PackedLayer
from .plain import plain_class, refuse_wrappers
from .replace import reason_decoded


class LayerSize(NamedTuple):
    """One row: what is stored of a layer.

    `bits`: a float, their average, where groups have bits of their own. `reason`: why the weight is in full precision, in the file or in
    memory; else empty.
    """

    name: str
    method: str
    bits: float
    bytes: int
    float_bytes: int
    reason: str


class SizeReport:
    """What :func:`size_report` returns; printing it gives a table.

    Attributes:
        bytes: what save() writes, less its header.
        float_bytes: the state of the model as it was before prepare.
        ratio: float_bytes over bytes.
        layers: list of LayerSize (name, method, bits, bytes, float_bytes, reason) in module order.
    """

    def __init__(self, layers: list[LayerSize]):
        self.layers = layers
        self.bytes = sum(row.bytes for row in layers)
        self.float_bytes = sum(row.float_bytes for row in layers)

    @property
    def ratio(self) -> float:
        """float_bytes / bytes."""
        return self.float_bytes / max(self.bytes, 1)

    def __str__(self):
        rows = [(r.name, r.method, bits_text(r.bits), kib(r.bytes), kib(r.float_bytes), r.reason) for r in self.layers]
        table = aligned(("layer", "method", "bits", "KiB", "float KiB", "in full precision because"), rows, "<<>>><")
        return f"{table}\nstored: {kib(self.bytes)} KiB; the float model: {kib(self.float_bytes)} KiB ({self.ratio:.1f} times as much)"

    def __repr__(self):
        return f"SizeReport(bytes={self.bytes}, float_bytes={self.float_bytes}, layers=[{len(self.layers)} rows])"


def size_report(model: nn.Module) -> SizeReport:
    """The bytes of a model's file, by layer. Nothing of the model changes.

    Args:
        model: a converted one; or a prepared one, for what converting and saving it would write, folded batch norms included; or a float
            one, for its state as it is.

    Returns:
        SizeReport: the bytes in all, and a row for each layer.

    Raises:
        TypeError: `model` is no nn.Module or a wrapper around it.
        ValueError: a prepared weight is NaN or infinite; a lazy layer that is not initialized; a state that is no dense tensor.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Conv2d(256, 256, 3, bias=False)), quantize.PowerOfTwo(4))
        >>> report = quantize.size_report(model)
        >>> report.bytes, report.float_bytes  # half a byte a weight, and 256 scales
        (295936, 2359296)
    """
    return report_of(model, "size_report")


def report_of(model: nn.Module, who: str) -> SizeReport:
    """As :func:`size_report`, called by `who`."""
    refuse_wrappers(model, who)
    for name, module in model.named_modules():
        for part, tensor in own_tensors(module):
            if isinstance(tensor, UninitializedTensorMixin):
                raise ValueError(f"{who}: {join(name, part)!r} must be initialized; run a batch through the lazy layer first")
    if next(prepared_weights(model), None) is not None:
        model = converted(model, who, calibrated=False)
    found = contents(model, who)
    stored: dict[tuple[str, str], list[Item]] = {}
    for item in found.tensors.values():
        stored.setdefault((item.layer, item.weight), []).append(item)
    rows, seen = [], set()
    for name, module in model.named_modules():
        for tensor, weight, entry, parts in packed_parts(name, module):
            nbytes, floats = _bytes(stored.pop((name, tensor), [])), _float_bytes(module, tensor, entry, parts, seen)
            rows.append(LayerSize(name, entry["method"], weight.form.mean_bits(weight.parts), nbytes, floats, ""))
            if not isinstance(module, PackedLayer):
                rows[-1] = rows[-1]._replace(reason=reason_decoded(module))
        plain = stored.pop((name, ""), [])
        if plain:
            first = max((item.tensor for item in plain), key=lambda t: t.nbytes)
            dtype = str(first.dtype).removeprefix("torch.")
            rows.append(LayerSize(name, dtype, 8 * first.element_size(), _bytes(plain), _bytes(plain), _reason(module, bool(found.layers))))
    return SizeReport(rows)


@torch.no_grad()
def bytes_beside_learned_bits(model: nn.Module) -> int:
    """What save() would write of a prepared model, less header and the codes of groups with learned bits."""
    model = copy_of(model, "size_penalty")
    for parameter in model.parameters():
        parameter.nan_to_num_(0, 0, 0)  # a diverged model has a size too
    stored = contents(converted(model, "size_penalty", calibrated=False), "size_penalty")
    codes = {join(entry["name"], entry.get("decoded", ""), "codes") for entry in stored.layers if entry["method"] == GROUPED}
    return sum(item.tensor.nbytes for name, item in stored.tensors.items() if name not in codes)


def _bytes(items: list[Item]) -> int:
    return sum(item.tensor.nbytes for item in items)


def _float_bytes(module: nn.Module, tensor: str, entry: dict, parts: dict[str, Tensor], seen: set[int]) -> int:
    """Of weight and bias and the folded batch norm, as the float model has them; what is tied counts once."""
    packed = isinstance(module, PackedLayer)
    size = (module.dtype if packed else getattr(module, tensor).dtype).itemsize
    codes = parts["codes" if packed else f"{tensor}.codes"]
    total = entry.get("batch_norm_bytes", 0) + entry.get("removed_bytes", 0)
    if id(codes) not in seen and "stays" not in entry:  # else it counts with the module that keeps it
        total += size * math.prod(entry["shape"])
        seen.add(id(codes))
    return total + (size * len(parts["bias"]) if packed and module.plain_bias else 0)


def _reason(module: nn.Module, any_packed: bool) -> str:
    if packed_weights(module):
        return ""  # its biases
    if isinstance(module, BATCH_NORMS) and any_packed:
        return "a batch norm that could not be folded"
    if plain_class(type(module)) in PACKED or isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *PACKED)):
        return "not prepared"
    return "no weight that prepare takes"


def dtype_bits(tensor: Tensor) -> int:
    """Bits of an element: 32 for float32."""
    return torch.finfo(tensor.dtype).bits if tensor.is_floating_point() else 8 * tensor.element_size()
