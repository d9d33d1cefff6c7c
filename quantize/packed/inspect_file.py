"""`python -m quantize inspect FILE`: what a saved model holds, by its file alone."""

from __future__ import annotations

import math

from ..files import path_of
from ..table import aligned, bits_text, kib
from .form import GROUPED
from .header import Bad, Header, read_header
from .modules import TENSORS


def inspect_file(path) -> str:
    """The table as text.

    Raises:
        FileNotFoundError. ValueError: a file that quantize.save did not write, or a damaged one; what is wrong with it is named.
    """
    path = path_of(path, "inspect")
    try:
        with open(path, "rb") as file:
            header = read_header(file)
    except Bad as error:
        raise ValueError(f"inspect: {path}: {error}") from None
    return _table(header)


def _table(header: Header) -> str:
    sizes = {name: stored.end - stored.start for name, stored in header.tensors.items()}
    data, rows, floats = sum(sizes.values()), [], 0
    for layer in header.layers:
        decoded = layer.get("decoded")
        prefix = ".".join(part for part in (layer["name"], decoded) if part)
        nbytes = sum(sizes.pop(f"{prefix}.{part}" if prefix else part, 0) for part in TENSORS)
        notes = [f"with {layer['batch_norm']}"] if "batch_norm" in layer else []
        notes += [f"with {' '.join(layer['removed'])} before it"] if "removed" in layer else []
        notes += [f"hands bits to {layer['feeds']}"] if "feeds" in layer else []
        notes += ["decoded when loaded"] if decoded else []
        notes += ["in float too, tied"] if "stays" in layer else []
        notes += [f"{part} of {owner.rpartition('.')[0]}" for part, owner in layer.get("tied", {}).items()]
        shape, activation_bits = "x".join(map(str, layer["shape"])), str(layer.get("activation_bits", 32))
        name = prefix if decoded else layer["name"]
        rows.append((name, layer["kind"], layer["method"], bits_text(_bits(layer)), activation_bits, shape, kib(nbytes), ", ".join(notes)))
        floats += layer.get("batch_norm_bytes", 0) + layer.get("removed_bytes", 0)
        if "stays" not in layer and (f"{decoded}.codes" if decoded else "codes") not in layer.get("tied", {}):
            floats += 4 * math.prod(layer["shape"])
    rest = sum(sizes.values())
    if sizes:
        rows.append(("others", f"{len(sizes)} tensors", "float", "", "", "", kib(rest), "as they were"))
    columns = ("layer", "kind", "method", "bits", "activation bits", "shape", "KiB", "note")
    totals = f"{len(header.layers)} packed weights; tensors: {kib(data)} KiB, header: {kib(header.size)} KiB"
    return f"{aligned(columns, rows, '<<<>><><')}\n{totals}; the packed weights in float32: {kib(floats)} KiB"


def _bits(layer: dict) -> float:
    """Of a code; on average, to the byte, where they differ."""
    return 8 * layer["code_bytes"] / math.prod(layer["shape"]) if layer["method"] == GROUPED else layer["bits"]
