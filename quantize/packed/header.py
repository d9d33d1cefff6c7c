"""A file's header: read within limits, and every field's type and range checked before anything is believed.

The file is one of safetensors: 8 bytes of length, JSON of that length, then the tensors' bytes without gaps. Its metadata have one key,
"quantize", with JSON of our own: {"format": "quantize", "version": 1, "checksum": ..., "layers": [...]}. The checksum is the CRC-32 of
the tensors in the order of their names and then of the layers; it finds damage, the other checks stand up to malice.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..checks import is_integer
from . import layout
from .form import GROUPED, METHODS, RANGES
from .grid import KINDS
from .layout import WIDTHS, storage_bits
from .stream import MOST_BITS

FORMAT, VERSION = "quantize", 1
MOST_HEADER_BYTES = 64 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Bad(ValueError):
    """What is wrong with a file, without its name."""


class Stored(NamedTuple):
    """Where a tensor lies: bytes `start` to `end`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """All that a file says about itself. `size`: bytes before the first tensor. `layers`: checked against LAYER."""

    size: int
    layers: list[dict]
    tensors: dict[str, Stored]
    checksum: int


def short(value) -> str:
    """repr, cut off: a hostile file's may be long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(low: int, high: int) -> Callable:
    return lambda v: is_integer(v) and low <= v <= high


def _list_of(check: Callable, low: int, high: int) -> Callable:
    return lambda v: isinstance(v, list) and low <= len(v) <= high and all(check(item) for item in v)


def _text(v) -> bool:
    return isinstance(v, str)


def _one_of(*values) -> Callable:
    return lambda v: any(v is item or (type(v) is type(item) and v == item) for item in values)


_MANY = 2**48
_SIZES = _list_of(_whole(0, _MANY), 1, 3)
# Field of a layer: what it must be, in words and as a check, and whether it must be there.
Fields = dict[str, tuple[str, Callable, bool]]
LAYER: Fields = {
    "name": ("a string", _text, True),
    "kind": ("a string", _text, True),
    "method": (f"one of {', '.join(METHODS)}", _one_of(*METHODS), True),
    "shape": ("a list of 2 to 5 positive integers", _list_of(_whole(1, _MANY), 2, 5), True),
    "activation_bits": ("an integer from 1 to 16", _whole(1, 16), False),
    "input": (f"one of {', '.join(KINDS)}", _one_of(*KINDS), False),
    "removed": ("a list of 1 to 3 strings", _list_of(_text, 1, 3), False),
    "removed_bytes": ("an integer", _whole(0, _MANY), False),
    "feeds": ("a string", _text, False),
    "bias": ("false, or not there", _one_of(False), False),
    "stride": ("a list of integers", _SIZES, False),
    "padding": ('a list of integers, "same" or "valid"', lambda v: _SIZES(v) or v in ("same", "valid"), False),
    "dilation": ("a list of integers", _SIZES, False),
    "output_padding": ("a list of integers", _SIZES, False),
    "groups": ("a positive integer", _whole(1, _MANY), False),
    "num_heads": ("a positive integer", _whole(1, _MANY), False),
    "padding_mode": ("a padding mode", _one_of("reflect", "replicate", "circular"), False),
    "batch_norm": ("a string", _text, False),
    "batch_norm_bytes": ("an integer", _whole(0, _MANY), False),
    "decoded": ("a string", _text, False),
    "stays": ("true, or not there", _one_of(True), False),  # the float weight is another module's too, which keeps it
    "tied": ("an object of strings", lambda v: isinstance(v, dict) and all(map(_text, v.values())), False),
}
# What else a layer has whose codes are rows, or a stream of groups.
ROWS: Fields = {
    "bits": ("an integer from 1 to 16", _whole(1, 16), True),
    "storage": ("1, 2, 4, 8 or 16", _one_of(*WIDTHS), True),
}
STREAM: Fields = {
    "bits": (f"an integer from 1 to {MOST_BITS}", _whole(1, MOST_BITS), True),
    "group_size": ("an integer, 0 for the whole tensor", _whole(0, _MANY), True),
    "range": (f"one of {', '.join(RANGES)}", _one_of(*RANGES), True),
    "code_bytes": ("a positive integer", _whole(1, _MANY), True),
}


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise Bad(f"header: {short(twice)} must appear once in its object; it appears again")
    return found


def _number(text: str):
    raise Bad(f"header: numbers must be whole; got {short(text)}")


def _parse(text: str, what: str) -> dict:
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except Bad:
        raise
    except (ValueError, RecursionError) as error:
        raise Bad(f"{what} must be JSON; {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise Bad(f"{what} must be a JSON object; got {short(value)}")
    return value


def read_header(file: BinaryIO) -> Header:
    """The checked header of an open file. Raises Bad; reads no more than the file has."""
    size = file.seek(0, 2)
    file.seek(0)
    if size < 10:
        raise Bad(f"header must have 8 bytes of length and JSON after them; the file has {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
        raise Bad(f"header's length must be 2 to {min(size - 8, MOST_HEADER_BYTES)}, by the file's size; got {length}")
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Bad(f"header must be UTF-8; {error.reason} at byte {8 + error.start}") from None
    fields = _parse(text, "header")
    metadata = fields.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != ["quantize"] or not _text(metadata["quantize"]):
        raise Bad(f'__metadata__ must have the one key "quantize", with a string, as quantize.save writes it; got {short(metadata)}')
    tensors = _tensors(fields, size - 8 - length)
    checksum, layers = _metadata(metadata["quantize"])
    return Header(8 + length, layers, tensors, checksum)


def _tensors(fields: dict, data: int) -> dict[str, Stored]:
    found = {}
    for name, value in fields.items():
        at = f"tensor {short(name)}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise Bad(f"{at} must have dtype, shape and data_offsets; got {short(value)}")
        if not _text(value["dtype"]) or value["dtype"] not in DTYPES:
            raise Bad(f"{at}: dtype must be one of {', '.join(DTYPES)}; got {short(value['dtype'])}")
        if not _list_of(_whole(0, _MANY), 0, 16)(value["shape"]):
            raise Bad(f"{at}: shape must be a list of sizes; got {short(value['shape'])}")
        if not _list_of(_whole(0, data), 2, 2)(value["data_offsets"]):
            raise Bad(
                f"{at}: data_offsets must be two numbers from 0 to {data}, the bytes that the file has; got {short(value['data_offsets'])}"
            )
        dtype, (start, end) = DTYPES[value["dtype"]], value["data_offsets"]
        if end - start != math.prod(value["shape"]) * dtype.itemsize:
            raise Bad(f"{at}: data_offsets must span shape {value['shape']} of {value['dtype']}; got {end - start} bytes")
        found[name] = Stored(dtype, tuple(value["shape"]), start, end)
    place = 0
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != place:
            raise Bad(f"tensor {short(name)}: data_offsets must begin where the tensor before ends, at {place}; got {stored.start}")
        place = stored.end
    if place != data:
        raise Bad(f"tensors must fill the file; they end at {place} of {data} bytes")
    return found


def _metadata(text: str) -> tuple[int, list[dict]]:
    fields = _parse(text, "quantize")
    if fields.get("format") != FORMAT:
        raise Bad(f"format must be {FORMAT!r}; got {short(fields.get('format'))}")
    version = fields.get("version")
    if not _whole(1, VERSION)(version):
        newer = ", of a newer quantize" if _whole(VERSION, _MANY)(version) else ""
        raise Bad(f"version must be {VERSION}; got {short(version)}{newer}")
    if set(fields) != {"format", "version", "checksum", "layers"}:
        raise Bad(f"quantize must have format, version, checksum and layers; got {short(sorted(fields))}")
    if not _whole(0, 2**32 - 1)(fields["checksum"]):
        raise Bad(f"checksum must be a 32-bit number; got {short(fields['checksum'])}")
    layers = fields["layers"]
    if not isinstance(layers, list):
        raise Bad(f"layers must be a list; got {short(layers)}")
    seen = set()
    for index, layer in enumerate(layers):
        _layer(layer, index)
        key = (layer["name"], layer.get("decoded", "weight"))
        if key in seen:
            raise Bad(f"layers[{index}].name must be another than those before; got {short(layer['name'])} again")
        seen.add(key)
    return fields["checksum"], layers


def _layer(layer, index: int) -> None:
    at = f"layers[{index}]"
    if not isinstance(layer, dict):
        raise Bad(f"{at} must be an object; got {short(layer)}")
    fields = {**LAYER, **(STREAM if layer.get("method") == GROUPED else ROWS)}
    for field, (words, check, needed) in fields.items():
        if field in layer and not check(layer[field]):
            raise Bad(f"{at}.{field} must be {words}; got {short(layer[field])}")
        if needed and field not in layer:
            raise Bad(f"{at}.{field} must be there: {words}")
    unknown = sorted(set(layer) - set(fields))
    if unknown:
        raise Bad(f"{at} must have fields that version {VERSION} has; got {short(unknown)}")
    (_stream if layer["method"] == GROUPED else _rows)(layer, at)
    for one, other in (("batch_norm", "batch_norm_bytes"), ("removed", "removed_bytes")):
        if (one in layer) != (other in layer):
            raise Bad(f"{at} must have {one} and {other}, or neither")
    if "input" in layer and layer.get("activation_bits") != 1:
        raise Bad(f"{at}.activation_bits must be 1 for input {layer['input']!r}; got {short(layer.get('activation_bits'))}")
    if "input" in layer and layer["bits"] != 1:
        raise Bad(f"{at}.bits must be 1 for input {layer['input']!r}; got {layer['bits']}")
    if "removed" in layer and "input" not in layer:
        raise Bad(f"{at}.input must be there: thresholds are of one bit")


def _rows(layer: dict, at: str) -> None:
    method = layout.METHODS[layer["method"]]
    if not method.min_bits <= layer["bits"] <= method.max_bits:
        raise Bad(f"{at}.bits must be {method.min_bits} to {method.max_bits} for {layer['method']}; got {layer['bits']}")
    if layer["storage"] != storage_bits(layer["bits"]):
        raise Bad(f"{at}.storage must be {storage_bits(layer['bits'])} for {layer['bits']} bits; got {layer['storage']}")


def _stream(layer: dict, at: str) -> None:
    numel = math.prod(layer["shape"])
    least, most = -(-numel // 8), -(-numel * layer["bits"] // 8)
    if not least <= layer["code_bytes"] <= most:
        raise Bad(f"{at}.code_bytes must be {least} to {most}, for {numel} codes; got {layer['code_bytes']}")


def metadata_text(layers: list[dict], checksum: int) -> str:
    """The JSON that `layers` are stored as."""
    fields = {"format": FORMAT, "version": VERSION, "checksum": checksum, "layers": layers}
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def layers_checksum(layers: list[dict], checksum: int) -> int:
    """The checksum of the tensors, continued over the layers."""
    return zlib.crc32(json.dumps(layers, separators=(",", ":"), allow_nan=False).encode(), checksum)


def read_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """All tensors, by name; sizes are those of the header, which are the file's. Raises Bad if the checksum is another."""
    tensors, checksum = {}, 0
    for name, stored in sorted(header.tensors.items()):
        data = bytearray(stored.end - stored.start)
        file.seek(header.size + stored.start)
        if file.readinto(data) != len(data):
            raise Bad(f"tensor {short(name)}: the file ends within it")
        checksum = zlib.crc32(data, checksum)
        if stored.dtype == torch.bool and data.strip(b"\0\1"):
            raise Bad(f"tensor {short(name)}: BOOL must be 0 or 1")
        flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
        tensors[name] = flat.reshape(stored.shape)
    checksum = layers_checksum(header.layers, checksum)
    if checksum != header.checksum:
        raise Bad(f"checksum must be {checksum}, that of tensors and layers; got {header.checksum}: the file is damaged")
    return tensors
