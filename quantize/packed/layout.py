"""How low-bit weights lie in bytes: the codes of a level, and the rows that hold them.

A row is one output channel: K codes in tap-major order (kernel positions outside, input channels inside; what channels_last memory has),
little-endian within a byte (code k at bit k * width of the row), then zero bits up to a multiple of 64. The same in memory and in files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROW_BYTES = 8  # rows are padded to this, once
WIDTHS = (1, 2, 4, 8, 16)


class Method(NamedTuple):
    """A weight quantizer as far as its codes go. `table(width)` lists the level of each code, NaN where no level has that code."""

    min_bits: int
    max_bits: int
    table: Callable[[int], list[float]]
    max_level: Callable[[int], float]  # of `bits`: the largest level that these bits have


def _uniform(width: int) -> list[float]:
    """Two's complement; the one without a positive twin stays unused, so that the grid is symmetric."""
    half = 1 << (width - 1)
    return [math.nan if code == half else float(code - 2 * half * (code > half)) for code in range(2 * half)]


def _power_of_two(width: int) -> list[float]:
    """Top bit: sign. The rest: 0 for zero, e + 1 for 2^e. Minus zero stays unused."""
    half = 1 << (width - 1)
    positive = [2.0**e for e in range(half - 1)]
    return [0.0, *positive, math.nan, *[-level for level in positive]]


def _odd(width: int) -> list[float]:
    """Two's complement, of which code c is the level 2c + 1: as many above zero as below, and 1 and -1 at one bit."""
    half = 1 << (width - 1)
    return [float(2 * (code - 2 * half * (code >= half)) + 1) for code in range(2 * half)]


METHODS = {
    "uniform": Method(2, 8, _uniform, lambda bits: 2 ** (bits - 1) - 1),
    "ternary": Method(2, 2, _uniform, lambda bits: 1.0),
    "xnor": Method(1, 1, _odd, lambda bits: 1.0),
    "dorefa": Method(1, 16, _odd, lambda bits: 2.0**bits - 1),
    "power_of_two": Method(2, 8, _power_of_two, lambda bits: 2.0 ** (2 ** (bits - 1) - 2)),
}


def storage_bits(bits: int) -> int:
    """The width that codes of `bits` bits are stored in: 1, 2, 4, 8 or 16."""
    return next(width for width in WIDTHS if width >= bits)


def row_bytes(k: int, width: int) -> int:
    """Bytes of a row of `k` codes."""
    return -(-k * width // (8 * ROW_BYTES)) * ROW_BYTES


@cache
def _levels(method: str, width: int, bits: int | None) -> tuple[float, ...]:
    most = math.inf if bits is None else METHODS[method].max_level(bits)
    return tuple(math.nan if abs(level) > most else level for level in METHODS[method].table(width))


def _table(method: str, width: int, bits: int | None) -> Tensor:
    """Made at each use: of tensors made while a model is traced or exported, none may outlive it."""
    return torch.tensor(_levels(method, width, bits), dtype=torch.float32, device="cpu")


def levels_table(method: str, width: int, bits: int | None = None) -> Tensor:
    """The level of each code, Tensor[2**width] of float32; NaN for codes that never occur (with fewer `bits`, more of them)."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if width not in WIDTHS:
        raise ValueError(f"storage must be 1, 2, 4, 8 or 16 bits; got {width!r}")
    return _table(method, width, bits)


def pack(levels: Tensor, method: str, bits: int) -> Tensor:
    """Levels Tensor[N, K] (whole numbers in any dtype) to rows uint8[N, row_bytes].

    Raises:
        ValueError: a number that is no level of `method` at `bits` bits.
    """
    width = storage_bits(bits)
    table = _table(method, width, bits).to(levels.device)
    order = torch.argsort(table)[: int((~table.isnan()).sum())]  # NaN sorts last
    levels = levels.float()
    place = torch.searchsorted(table[order], levels.contiguous()).clamp_(max=len(order) - 1)
    codes = order[place]
    wrong = ~(table[codes] == levels)  # NaN too
    if wrong.any():
        row, k = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"pack: levels must be those of {method} at {bits} bits; got {float(levels[row, k])!r} at [{row}, {k}]")
    return join(codes, width)


def join(codes: Tensor, width: int) -> Tensor:
    """Codes Tensor[N, K] of `width` bits to rows uint8[N, row_bytes]; the inverse of :func:`split`."""
    if width == 16:
        return join(torch.stack([codes & 255, codes >> 8], -1).flatten(1), 8)
    codes = codes.to(torch.uint8)
    per_byte, k = 8 // width, codes.shape[1]
    padded = codes.new_zeros(len(codes), row_bytes(k, width) * per_byte)
    padded[:, :k] = codes
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
    return (padded.view(len(codes), -1, per_byte) << shifts).sum(-1, dtype=torch.uint8)


def split(rows: Tensor, width: int) -> Tensor:
    """The codes of rows uint8[N, row_bytes], padding included: uint8, at 16 bits int32."""
    if width == 16:
        pairs = rows.unflatten(1, (-1, 2)).int()
        return pairs[..., 0] | pairs[..., 1] << 8
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=rows.device)
    return ((rows.unsqueeze(-1) >> shifts) & (2**width - 1)).flatten(1)


def unpack(rows: Tensor, k: int, method: str, bits: int) -> Tensor:
    """Rows uint8[N, row_bytes] to levels float32[N, k]; the exact inverse of :func:`pack`.

    Raises:
        ValueError: rows of another length, a code that no level has at `bits` bits, or padding that is not zero.
    """
    width = storage_bits(bits)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_bytes(k, width):
        raise ValueError(f"codes must be uint8 [N, {row_bytes(k, width)}]; got {str(rows.dtype)[6:]} {list(rows.shape)}")
    codes = split(rows, width)
    padding = codes[:, k:].any(1).nonzero()
    if len(padding):
        raise ValueError(f"codes: the padding after a row's {k} codes must be zero bits; row {int(padding[0])} has ones")
    levels = _table(method, width, bits).to(rows.device)[codes[:, :k].int()]
    wrong = levels.isnan()
    if wrong.any():
        row, at = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"codes: {int(codes[row, at])} at [{row}, {at}] is no code of {method} at {bits} bits")
    return levels


def to_rows(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """A weight as matrix [output channels, K].

    Args:
        weight: Tensor[N, C, *kernel], or for transposed convolutions Tensor[C, N / groups, *kernel]; any dtype.
    """
    if transposed:
        weight = weight.unflatten(0, (groups, len(weight) // groups)).transpose(1, 2).flatten(0, 1)
    return weight.movedim(1, -1).flatten(1)


def from_rows(rows: Tensor, shape: tuple[int, ...], transposed: bool = False, groups: int = 1) -> Tensor:
    """The inverse of :func:`to_rows` in the weight's own `shape`: a view, but of transposed convolutions."""
    if transposed:
        inputs, outputs, *kernel = shape
        rows = rows.reshape(groups, outputs, *kernel, inputs // groups).movedim(-1, 1)
        return rows.reshape(shape).contiguous()
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def rows_and_k(shape: tuple[int, ...], transposed: bool = False, groups: int = 1) -> tuple[int, int]:
    """(output channels, K) of a weight of `shape`."""
    outputs = shape[1] * groups if transposed else shape[0]
    return outputs, math.prod(shape) // outputs if outputs else math.prod(shape[1:])
