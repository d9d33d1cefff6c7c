"""What a layer does to its input before it multiplies: the levels that the input is rounded to, fixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dtypes import FLOATS

PARTS = ("step", "zero_point", "threshold", "flip")  # what grids store
KINDS = ("sign", "unit")  # of signs; a grid of steps has no such word in files


@dataclass(frozen=True, eq=False)
class Grid(ABC):
    """`parts`: the tensors that are stored of it."""

    bits: int

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """By name."""

    @abstractmethod
    def fields(self) -> dict:
        """As a file's JSON has it."""

    @abstractmethod
    def apply(self, input: Tensor, axis: int) -> Tensor:
        """`input`, channels in dimension `axis`, on the grid: shape and dtype as given."""


@dataclass(frozen=True, eq=False)
class StepGrid(Grid):
    """step * ({0 .. 2^bits - 1} - zero_point); float32 scalars. The gradient passes straight through."""

    step: Tensor
    zero_point: Tensor

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"step": self.step, "zero_point": self.zero_point}

    def fields(self) -> dict:
        return {"activation_bits": self.bits}

    def apply(self, input: Tensor, axis: int) -> Tensor:
        if not torch.compiler.is_compiling() and _transformed(input):
            return _traceable(input, self.step, self.zero_point, 2**self.bits - 1)
        supported = input.dtype in FLOATS
        x = input if supported else input.float()
        return torch.ops.quantize.lsq(x, self.step, self.zero_point, 2**self.bits - 1, 1.0).to(input.dtype)


def _transformed(input: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know PyTorch's own operations only."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad.unpack_dual(input).tangent is not None


def _traceable(x: Tensor, step: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """What the op lsq computes (csrc/weight/lsq.h), in such operations."""
    scaled, low, high = x.float() * (1 / step), -zero_point, levels - zero_point
    passed = torch.where((scaled >= low) & (scaled <= high), x, 0)
    return (scaled.round().clamp(low, high) * step).to(x.dtype) + (passed - passed.detach())


@dataclass(frozen=True, eq=False)
class SignGrid(Grid):
    """One bit: of signs ("sign"), +1 and -1, or of {0, 1} ("unit"), 1 above a half. No gradient passes.

    `threshold` float32[channels] and `flip` uint8[channels], or None: the bit of x is ``(x < threshold) ^ flip``. Bit 1 is -1, or 1.
    They contain the batch norm before the sign, where there was one (thresholds.py).
    """

    kind: str
    threshold: Tensor | None = None
    flip: Tensor | None = None
    removed: tuple[str, ...] = ()  # modules that the thresholds contain, by name
    removed_bytes: int = 0  # of their float parameters and buffers

    @property
    def parts(self) -> dict[str, Tensor]:
        return {} if self.threshold is None else {"threshold": self.threshold, "flip": self.flip}

    def fields(self) -> dict:
        fields = {"activation_bits": 1, "input": self.kind}
        if self.removed:
            fields |= {"removed": list(self.removed), "removed_bytes": self.removed_bytes}
        return fields

    def bits_of(self, input: Tensor, axis: int) -> Tensor:
        """Bool Tensor like `input`."""
        if self.threshold is None:
            return input < 0 if self.kind == "sign" else input > 0.5
        shape = [-1 if d == axis % input.dim() else 1 for d in range(input.dim())]
        return (input < self.threshold.view(shape)) ^ self.flip.bool().view(shape)

    def apply(self, input: Tensor, axis: int) -> Tensor:
        bits = self.bits_of(input, axis)
        return torch.where(bits, -1, 1).to(input.dtype) if self.kind == "sign" else bits.to(input.dtype)


def grid_of(fields: Mapping, parts: Mapping[str, Tensor]) -> Grid | None:
    """The grid that a file's JSON and its tensors describe; None where inputs are floats."""
    if "activation_bits" not in fields:
        return None
    if "input" not in fields:
        return StepGrid(fields["activation_bits"], parts["step"], parts["zero_point"])
    removed = tuple(fields.get("removed", ())), fields.get("removed_bytes", 0)
    return SignGrid(1, fields["input"], parts.get("threshold"), parts.get("flip"), *removed)
