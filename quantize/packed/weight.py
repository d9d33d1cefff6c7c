"""A weight as codes and scales, wherever it is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import functional
from .layout import levels_table, pack, row_bytes, rows_and_k, storage_bits, to_rows, unpack


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Codes uint8[N, row_bytes] and scales float32[N] of a float weight of `shape`.

    `transposed`, `groups`: of a transposed convolution, whose output channels lie in dimension 1, a group's only.
    """

    method: str
    bits: int
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    transposed: bool = False
    groups: int = 1

    @classmethod
    def of(cls, method: str, bits: int, levels: Tensor, scales: Tensor, transposed: bool, groups: int) -> PackedWeight:
        """From what WeightQuantizer.encode gives: levels with the channel axis first, and a scale for each of its entries."""
        if transposed:
            levels, scales = levels.movedim(0, 1), scales.repeat(groups)
        else:
            groups = 1
        codes = pack(to_rows(levels, transposed, groups), method, bits)
        return cls(method, bits, tuple(levels.shape), codes, scales.float().contiguous(), transposed, groups)

    def scaled(self, factor: Tensor) -> PackedWeight:
        """With scales multiplied by `factor`, float64[N]. The codes are shared."""
        return replace(self, scales=(self.scales.double() * factor).float())

    def decode(self) -> Tensor:
        """The float32 weight, contiguous."""
        levels = levels_table(self.method, storage_bits(self.bits)).to(self.codes.device)
        return functional.decode(self.codes, self.scales, levels, self.shape, self.transposed, self.groups).contiguous()

    def check(self) -> None:
        """ValueError for impossible codes, padding that is not zero, or scales that are not finite."""
        _, k = rows_and_k(self.shape, self.transposed, self.groups)
        unpack(self.codes, k, self.method, self.bits)
        wrong = (~self.scales.isfinite()).nonzero()
        if len(wrong):
            raise ValueError(f"scales must be finite; got {float(self.scales[wrong[0]])} at [{int(wrong[0])}]")


def tensor_shapes(shape: tuple[int, ...], bits: int, transposed: bool, groups: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What dtype and shape `codes` and `scales` of a weight must have."""
    n, k = rows_and_k(shape, transposed, groups)
    return {"codes": (torch.uint8, (n, row_bytes(k, storage_bits(bits)))), "scales": (torch.float32, (n,))}


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight's dimension 1 holds the output channels."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd) or getattr(module, "transposed", False) is True
