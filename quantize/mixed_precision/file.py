"""Sensitivities as safetensors files."""

from __future__ import annotations

import json
import os
import zlib

import torch

from ..files import path_of, save_tensors
from .choices import describe, restore
from .sensitivity import Sensitivity

FORMAT = "quantize.sensitivity/1"
TABLES = ("matrix", "bytes", "bit_ops")
FIELDS = ("layers", "choices", "members", "shapes", "link", "method", "metric", "samples", "other_bytes")


def write(tensors: dict[str, torch.Tensor], fields: dict, path, who: str = "Sensitivity.save") -> None:
    """A safetensors file of `tensors` with `fields` as JSON in its header, complete or not there at all.

    `fields` name their `format`; `who` is the function that errors name.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, json.dumps({**fields, "crc32": checksum(tensors, fields)}), path, who)


def read(path, who: str, format: str, tables: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of :func:`write`: the tensors, which must be those named in `tables`, and the fields without the checksum.

    FileNotFoundError, or ValueError for a file that is damaged or of another `format`.
    """
    from safetensors import SafetensorError, safe_open

    path = path_of(path, who)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{who}: path must be a file; there is none at {path}")
    try:
        with safe_open(path, "pt") as stream:
            text = (stream.metadata() or {}).get("quantize")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  not a dict
        fields = json.loads(text) if text is not None else None
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{who}: {path} is damaged or no safetensors file: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != format:
        found = fields.get("format", "no format") if isinstance(fields, dict) else "no such header"
        raise ValueError(f"{who}: {path} must be of format {format!r}; found {found!r}")
    if set(tensors) != set(tables):
        raise ValueError(f"{who}: {path} must hold tensors {', '.join(tables)}; found {', '.join(sorted(tensors)) or 'none'}")
    if fields.pop("crc32", None) != checksum(tensors, fields):
        raise ValueError(f"{who}: {path} is damaged: its checksum is another")
    return tensors, fields


def checksum(tensors: dict[str, torch.Tensor], fields: dict) -> int:
    """CRC-32 of the fields, as JSON with sorted names, and of the tensors' bytes in the order of their names."""
    crc = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()), crc)
    return crc


def save(sensitivity: Sensitivity, path) -> None:
    """:meth:`quantize.Sensitivity.save`: its tables as tensors, everything else as JSON."""
    fields = {"format": FORMAT, "configs": [describe(config) for config in sensitivity.configs]}
    fields |= {name: getattr(sensitivity, name) for name in FIELDS}
    write({name: getattr(sensitivity, name) for name in TABLES}, fields, path)


def load(path) -> Sensitivity:
    """:meth:`quantize.Sensitivity.load`: what the fields hold is checked as the arguments of Sensitivity are."""
    tensors, fields = read(path, "Sensitivity.load", FORMAT, TABLES)
    missing = [name for name in ("configs", *FIELDS) if name not in fields]
    if missing:
        raise ValueError(f"Sensitivity.load: {path} must have the field {missing[0]!r}; it has not")
    rest = {name: fields[name] for name in FIELDS if name not in ("layers", "choices")}
    try:
        configs = [restore(entry) for entry in fields["configs"]]
        choices = [tuple(pair) for pair in fields["choices"]]
        return Sensitivity(fields["layers"], choices, *(tensors[name] for name in TABLES), configs=configs, **rest)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"Sensitivity.load: {path} is damaged: {str(error)[:500]}") from error
