"""Where an interrupted measurement goes on: a file for each process."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import Tensor

from .file import read, write

FORMAT = "quantize.sensitivity_checkpoint/1"
TABLES = ("single", "pair")


class Sums(NamedTuple):
    """Over the samples so far: replaced as a whole, so that whenever Ctrl-C comes they are those of `done` units."""

    single: Tensor  # float64 [L*K]; of "composed" the float logits [N, C]
    pair: Tensor  # float64 [L*K, L*K]; of "composed" their changes [L*K, N, C]
    done: int  # units of this process: batches of the methods that look at logits, else a layer's choice in a batch


class Checkpoint:
    """The sums in a file, with the fingerprint `mark` of what is measured. `path` None: there is no file, and nothing is written."""

    def __init__(self, path, mark: str, who: str):
        self.path, self.mark, self.who = path, mark, who

    def save(self, sums: Sums) -> None:
        """Unless there is nothing yet."""
        if self.path is not None and sums.done:
            tensors = {"single": sums.single.cpu(), "pair": sums.pair.cpu()}
            write(tensors, {"format": FORMAT, "mark": self.mark, "done": sums.done}, self.path, f"{self.who}: checkpoint")

    def load(self, nothing: Sums) -> Sums:
        """What was saved, or `nothing`. ValueError if it is damaged or of another measurement."""
        if self.path is None or not os.path.exists(self.path):
            return nothing
        tensors, fields = read(self.path, f"{self.who}: checkpoint", FORMAT, TABLES)
        if fields.get("mark") != self.mark:
            raise ValueError(f"{self.who}: checkpoint {self.path} must be of this model, these batches and arguments; it is of others")
        return Sums(*(tensors[name].to(nothing.pair.device) for name in TABLES), fields["done"])

    def remove(self) -> None:
        """The measurement is through."""
        if self.path is not None and os.path.exists(self.path):
            os.unlink(self.path)
