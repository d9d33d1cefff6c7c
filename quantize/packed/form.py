"""How a weight is stored: which tensors there are, of what shapes, and what they decode to. Without the tensors themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import layout, stream

RANGES = ("channel", "tensor", "group")  # weights that share a range, in groups with bits of their own
GROUPED = "diffq"  # the method that makes such groups
METHODS = (*layout.METHODS, GROUPED)


@dataclass(frozen=True)
class Form(ABC):
    """A float weight of `shape` in codes of `bits` bits at most.

    `transposed`, `groups`: of a transposed convolution, whose output channels lie in dimension 1, a group's only.
    """

    method: str
    bits: int
    shape: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    parts = ()  # names of the stored tensors

    @property
    def channels(self) -> int:
        """Output channels."""
        return layout.rows_and_k(self.shape, self.transposed, self.groups)[0]

    @abstractmethod
    def fields(self) -> dict:
        """As a file's JSON has it."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What dtype and shape the stored tensors must have, by name."""

    def mean_bits(self, parts: Mapping[str, Tensor]) -> float:
        """Bits of a code, on average where they differ."""
        return self.bits

    @abstractmethod
    def table(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What :meth:`decode` needs beside the stored tensors and may be kept between its calls."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], table: Tensor) -> Tensor:
        """The float32 weight of `shape`, in the memory order of the codes where it can be."""

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """ValueError for codes that cannot be, padding that is not zero, or scales that are not finite."""
        scales = parts["scales"]
        wrong = (~scales.isfinite()).nonzero()
        if len(wrong):
            at = wrong[0].tolist()
            raise ValueError(f"scales must be finite; got {float(scales[tuple(at)])} at {at}")

    @abstractmethod
    def scaled(self, parts: Mapping[str, Tensor], factor: Tensor) -> tuple[Form, dict[str, Tensor]] | None:
        """Form and tensors of the weight with its output channels multiplied by `factor`, float64[channels].

        None where they cannot have scales of their own.
        """


@dataclass(frozen=True)
class Rows(Form):
    """Codes of one width in rows (layout.py): `codes` uint8[channels, row_bytes], `scales` float32[channels]."""

    parts = ("codes", "scales")

    def fields(self) -> dict:
        width = layout.storage_bits(self.bits)
        return {"method": self.method, "bits": self.bits, "storage": width, "shape": list(self.shape)}

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        n, k = layout.rows_and_k(self.shape, self.transposed, self.groups)
        return {"codes": (torch.uint8, (n, layout.row_bytes(k, layout.storage_bits(self.bits)))), "scales": (torch.float32, (n,))}

    def table(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The level of each code."""
        return layout.levels_table(self.method, layout.storage_bits(self.bits)).to(parts["codes"].device)

    def decode(self, parts: Mapping[str, Tensor], table: Tensor) -> Tensor:
        n, k = layout.rows_and_k(self.shape, self.transposed, self.groups)
        rows = torch.ops.quantize.decode_weight(parts["codes"], table, parts["scales"], layout.storage_bits(self.bits), k)
        return layout.from_rows(rows, self.shape, self.transposed, self.groups)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        _, k = layout.rows_and_k(self.shape, self.transposed, self.groups)
        layout.unpack(parts["codes"], k, self.method, self.bits)
        super().check(parts)

    def scaled(self, parts: Mapping[str, Tensor], factor: Tensor) -> tuple[Form, dict[str, Tensor]]:
        return self, {**parts, "scales": (parts["scales"].double() * factor).float()}


@dataclass(frozen=True)
class Stream(Form):
    """Groups of `group_size` codes (0: one group) with bits of their own in a stream (stream.py) of `code_bytes` bytes.

    `codes` uint8[code_bytes], `group_bits` uint8[ceil(groups / 2)], `scales` float32[rows, 2]: low end and range of each output channel's
    weights (each entry's of the channel dimension), of the tensor's, or of each group's, as `range` says.
    """

    group_size: int = 0
    range: str = "channel"
    code_bytes: int = 0

    parts = ("codes", "group_bits", "scales")

    @property
    def size(self) -> int:
        """Codes of a group."""
        numel = math.prod(self.shape)
        return min(self.group_size or numel, numel)

    @property
    def span(self) -> int:
        """Weights in a row that share a range."""
        numel = math.prod(self.shape)
        return {"channel": numel // self.shape[1 if self.transposed else 0], "tensor": numel, "group": self.size}[self.range]

    def fields(self) -> dict:
        fields = {"method": self.method, "bits": self.bits, "shape": list(self.shape)}
        return {**fields, "group_size": self.group_size, "range": self.range, "code_bytes": self.code_bytes}

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        numel = math.prod(self.shape)
        nibbles = -(-stream.group_count(numel, self.size) // 2)
        rows = stream.group_count(numel, self.span)
        return {"codes": (torch.uint8, (self.code_bytes,)), "group_bits": (torch.uint8, (nibbles,)), "scales": (torch.float32, (rows, 2))}

    def mean_bits(self, parts: Mapping[str, Tensor]) -> float:
        numel = math.prod(self.shape)
        bits = stream.unpack_bits(parts["group_bits"], stream.group_count(numel, self.size))
        return stream.stream_bits(bits, numel, self.size) / numel

    def table(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The codes, one or two bytes each."""
        return stream.unpack(parts["codes"], parts["group_bits"], math.prod(self.shape), self.size, self.bits)

    def decode(self, parts: Mapping[str, Tensor], table: Tensor) -> Tensor:
        weight = torch.ops.quantize.decode_groups(table, parts["group_bits"], parts["scales"], self.size, self.span)
        if not self.transposed:
            return weight.view(self.shape)
        inputs, outputs, *kernel = self.shape
        return weight.view(outputs, inputs, *kernel).movedim(0, 1)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        stream.check(parts["codes"], parts["group_bits"], math.prod(self.shape), self.size, self.bits)
        super().check(parts)

    def scaled(self, parts: Mapping[str, Tensor], factor: Tensor) -> tuple[Form, dict[str, Tensor]] | None:
        if self.range == "group" or self.shape[1 if self.transposed else 0] != len(factor):
            return None
        scales = (parts["scales"].double() * factor.unsqueeze(1)).float()  # the tensor's range becomes each channel's own
        return replace(self, range="channel"), {**parts, "scales": scales}


def form_of(entry: Mapping, transposed: bool, groups: int) -> Form:
    """The form that an entry of a file's JSON describes."""
    common = entry["method"], entry["bits"], tuple(entry["shape"]), transposed, groups
    if entry["method"] != GROUPED:
        return Rows(*common)
    return Stream(*common, entry["group_size"], entry["range"], entry["code_bytes"])
