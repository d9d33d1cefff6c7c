"""What a run writes down: one JSON object per epoch in `log.jsonl`, and the same numbers for TensorBoard where it is installed."""

import json
from pathlib import Path

import files

FILE = "log.jsonl"
NEEDED = {"epoch", "seconds", "test_top1"}  # what the scripts read of an entry


class Logs:
    """Logs in `folder`; entries of epochs from `first_epoch` on, left by a run that this one continues, are dropped."""

    def __init__(self, folder: Path, first_epoch: int = 0):
        self.file = folder / FILE
        kept = [entry for entry in read(self.file) if entry["epoch"] < first_epoch] if first_epoch and self.file.exists() else []
        files.write(self.file, "".join(json.dumps(entry) + "\n" for entry in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
        except ImportError:
            self.board = None

    def write(self, entry: dict) -> None:
        """Add the numbers of one epoch."""
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.board is not None:
            for name, value in entry.items():
                if name != "epoch" and value is not None:
                    self.board.add_scalar(name, value, entry["epoch"])
            self.board.flush()

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self.board is not None:
            self.board.close()


def read(file: Path) -> list[dict]:
    """Entries of a log; a last line that a killed process left unfinished is skipped. ValueError if another one is none."""
    entries = []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"log {file}: expected a file of JSON objects; got {error}") from error
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                break
            entry = None
        if not isinstance(entry, dict) or not NEEDED.issubset(entry) or not isinstance(entry["epoch"], int):
            raise ValueError(f"log {file}: expected a JSON object with {', '.join(sorted(NEEDED))} in line {number + 1}; got {line[:60]!r}")
        entries.append(entry)
    return entries
