#!/usr/bin/env python3
"""A table of trainings with low-bit weights: accuracy, size, bits and speed of the packed models. What zoo.sh ends with.

    python examples/zoo.py runs/mnist5k-*-diffq-*

FOLDERS are what zoo.sh and launch.sh leave; where a training broke off, its last checkpoint counts. A second call measures only what has
changed. Exit status 1: a folder holds no checkpoint, or a bad one.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import pandas

import checkpoint
import data
import options
from evaluate import fingerprint_of
from measure import Bench, state_bytes
from memory import MIB
from models import default_width
from rows import SOURCE, Rows

KEY = ("arch", "dataset", "config", "seed")
MEASURED = (
    "epoch",  # of the checkpoint
    "epochs",  # that were asked for
    "top1",  # of the packed model on the test set, percent
    "size_mib",  # of the packed file
    "compression",  # size of the same model as a file of float weights, over that
    "average_bits",  # of a weight of the quantized layers
    "skipped_steps",  # gradients not finite
    "latency1_ms",  # of one image, one CPU thread, median
    "float_latency1_ms",  # of the same model in full precision, in turns with the above
)


def main(argv: list[str] | None = None) -> int:
    """Measure as `argv` says; 0, or 1 if checkpoints are missing or bad."""
    parser = argparse.ArgumentParser("zoo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a training")
    parser.add_argument(
        "--output", type=Path, default=Path("zoo.csv"), help="CSV to fill; other trainings' rows in it stay (default: zoo.csv)"
    )
    args = parser.parse_args(argv)
    rows = Rows(args.output, KEY, KEY + MEASURED + SOURCE)
    keys, problems = [], []
    for folder in args.folders:
        try:
            keys.append(add_row(rows, folder))
        except (OSError, ValueError) as error:
            problems.append(error)
    if keys:
        table = pandas.DataFrame([rows.rows[key] for key in keys]).drop(columns=list(SOURCE))
        print(table.round(3).to_string(index=False))
    for problem in problems:
        print(f"zoo.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


def add_row(rows: Rows, folder: Path) -> tuple:
    """The key of the folder's row, measured if it is not there or its checkpoint is another one."""
    flags, file = folder / "flags", folder / "last.pt"
    if not flags.is_file() or not file.is_file():
        raise FileNotFoundError(
            f"FOLDER: expected the flags and last.pt of a training in {folder}; {file.name} or {flags.name} is not there"
        )
    run = options.parse(flags.read_text().split())
    key = (run.arch, run.dataset, options.label(run), run.seed)
    fingerprint = fingerprint_of(file, run)
    if rows.has(key, fingerprint):
        return key
    bench, classes = bench_of(run.dataset, run.data_path, run.image_size, run.batch_size, run.limit_test)
    run.width, run.num_classes = run.width or default_width(run.arch), run.num_classes or classes
    source = {"checkpoint": str(file), "fingerprint": fingerprint}
    rows.add(dict(zip(KEY, key, strict=True)) | measure(bench, run, checkpoint.read(file, run, "FOLDER")) | source)
    return key


def measure(bench: Bench, run: argparse.Namespace, content: dict) -> dict:
    """The measured columns of the training that train.py's options `run` describe, at the checkpoint `content`."""
    method = "qat" if run.weights else "fp32"
    found = bench.measure(method, run, content)
    return {
        "epoch": content["epoch"],
        "epochs": run.epochs,
        "top1": found["top1"],
        "size_mib": found["file_bytes"] / MIB,
        "compression": state_bytes(bench.create(run)) / found["file_bytes"],
        "average_bits": found["average_bits"],
        "skipped_steps": content.get("skipped", [0])[0],
        "latency1_ms": found["latency1_ms"],
        "float_latency1_ms": found["float_latency1_ms"],
    }


@cache
def bench_of(dataset: str, data_path: Path, image_size: int, batch_size: int, limit_test: int | None) -> tuple[Bench, int]:
    """What measures on a data set, and its number of classes."""
    parts = data.load(dataset, data_path, image_size)
    return Bench(*parts, batch_size, limit_test, 1, timed=(1,)), parts[0].classes


if __name__ == "__main__":
    sys.exit(main())
