"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> str:
    """Columns aligned to the `sides` ("<" or ">" each), between two rules."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    lines = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:], rule])


def _printable(cell: str) -> str:
    """Names come from files too: no control characters to the terminal."""
    return cell if cell.isprintable() else repr(cell)[1:-1]


def kib(nbytes: int) -> str:
    """Bytes in KiB, one decimal."""
    return f"{nbytes / 1024:,.1f}"


def bits_text(bits: float) -> str:
    """A number of bits; averages with two decimals."""
    return str(bits) if isinstance(bits, int) else f"{bits:.2f}"


def short_count(number: int) -> str:
    """A large count with its decimal prefix: 41.0 M."""
    for limit, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:,.1f} {unit}"
    return str(number)
