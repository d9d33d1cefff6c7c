"""The CSV that evaluate.py writes: a row for each model, data set, method, quantizer and seed, kept while its checkpoint is the same.

zoo.py has one with other columns.
"""

from pathlib import Path

import pandas

import files
from said import blaming

KEY = ("arch", "width", "dataset", "method", "quantizer", "bits", "activation_bits", "float_layers", "seed")
MEASURED = (
    "top1",  # accuracy on the test set, percent
    "test_loss",
    "relative_mse",  # of the quantized weights, over the sum of the squares of the full-precision ones
    "file_bytes",
    "latency1_ms",  # of a batch of 1, one thread, median; packed where the row is quantized
    "float_latency1_ms",  # of the same model in full precision, in turns with the above
    "latency128_ms",
    "float_latency128_ms",
)
SOURCE = ("checkpoint", "fingerprint")  # the file, and a hash of its content and of the settings that decide about the row
COLUMNS = KEY + MEASURED + SOURCE


class Rows:
    """The rows in `file`, by their key. Every change is written at once."""

    def __init__(self, file: Path, key: tuple[str, ...] = KEY, columns: tuple[str, ...] = COLUMNS):
        self.file, self.key, self.columns, self.rows = file, key, columns, {}
        with self._writing():  # said before anything is measured, not after
            files.try_out(file)
        if not file.exists():
            return
        try:
            table = pandas.read_csv(file)
        except (OSError, ValueError) as error:  # pandas' parsing errors are ValueErrors
            raise ValueError(f"--output: expected {file} to be a CSV of this script; pandas says: {error}") from error
        if tuple(table.columns) != columns:
            found = ", ".join(map(str, table.columns))
            raise ValueError(f"--output: expected {file} to have the columns {', '.join(columns)}; got {found}")
        for row in table.to_dict("records"):
            self.rows[tuple(row[name] for name in key)] = row

    def has(self, key: tuple, fingerprint: str) -> bool:
        """Whether there is a row for `key` computed from just this checkpoint."""
        return key in self.rows and self.rows[key]["fingerprint"] == fingerprint

    def add(self, row: dict) -> None:
        """Put in the columns of `row`, in place of a row with the same key."""
        self.rows[tuple(row[name] for name in self.key)] = {name: row[name] for name in self.columns}
        self._write()

    def drop(self, key: tuple, checkpoint: str) -> None:
        """Take out the row if it is of this checkpoint, which is no longer what it was."""
        if key in self.rows and self.rows[key]["checkpoint"] == checkpoint:
            del self.rows[key]
            self._write()

    def _write(self):
        table = pandas.DataFrame(list(self.rows.values()), columns=list(self.columns))
        with self._writing():
            files.write(self.file, table.sort_values(list(self.key)).to_csv(index=False))

    @staticmethod
    def _writing():
        return blaming("--output: expected a file that can be written", OSError)

    def summary(self, keys: list[tuple]) -> str:
        """Mean ± deviation over seeds of the rows with these keys, as text."""
        rows = [self.rows[key] for key in keys if key in self.rows]
        if not rows:
            return "no rows"
        table = pandas.DataFrame(rows)
        lines = []
        for group, part in table.groupby(list(KEY[:-1]), sort=False):
            line = dict(zip(KEY, group, strict=False)) | {"seeds": len(part), "top-1, %": _spread(part.top1, ".2f")}
            line["relative MSE"] = _spread(part.relative_mse, ".4f")
            line["file bytes"] = f"{part.file_bytes.mean():,.0f}"
            for batch in (1, 128):
                packed, plain = part[f"latency{batch}_ms"].mean(), part[f"float_latency{batch}_ms"].mean()
                line[f"ms, batch {batch} (float)"] = f"{packed:.2f} ({plain:.2f})"
            lines.append(line)
        return pandas.DataFrame(lines).to_string(index=False)


def _spread(values, form):
    deviation = f" ± {values.std():{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{deviation}"
