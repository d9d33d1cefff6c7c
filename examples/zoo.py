#!/usr/bin/env python3
"""A table of trainings with low-bit weights: accuracy, size, bits and speed of the packed models. What zoo.sh ends with.

    python examples/zoo.py runs/mnist5k-*-diffq-*

FOLDERS are what train.py, zoo.sh and launch.sh leave; where a training broke off, its last checkpoint counts. A second call measures only
what has changed. Exit status 1: a folder holds no checkpoint, or a bad one.
"""

import argparse
import shlex
import sys
from functools import cache
from pathlib import Path

import pandas

import checkpoint
import data
import options
import trained
from evaluate import fingerprint_of
from measure import Bench, state_bytes
from memory import MIB
from models import default_width
from rows import Rows
from said import blaming, line, said

KEY = ("arch", "dataset", "config", "seed", "checkpoint")  # the file: schedules are not in `config`
MEASURED = (
    "width",
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
    text = "where the data sets of trainings lie that were not started by one of the scripts (default: datasets)"
    parser.add_argument("--data-path", type=Path, default=Path("datasets"), help=text)
    args = parser.parse_args(argv)
    rows = Rows(args.output, KEY, (*KEY, *MEASURED, "fingerprint"))
    keys, problems = [], []
    for folder in args.folders:
        try:
            keys.append(add_row(rows, folder, args.data_path))
        except (OSError, ValueError) as error:
            problems.append(error)
    if keys:
        table = pandas.DataFrame([rows.rows[key] for key in keys]).drop(columns=["checkpoint", "fingerprint"])
        print(table.round(3).to_string(index=False))
    for problem in problems:
        print(f"zoo.py: {line(problem)}", file=sys.stderr)
    return 1 if problems else 0


def add_row(rows: Rows, folder: Path, data_path: Path) -> tuple:
    """The key of the folder's row, measured if it is not there or its checkpoint is another one."""
    file = folder / "last.pt"
    if not file.is_file():
        raise FileNotFoundError(f"FOLDER: expected a training's last.pt in {folder}; there is none")
    run = run_of(file, data_path)
    key = (run.arch, run.dataset, options.label(run), run.seed, str(file))
    fingerprint = fingerprint_of(file, run)
    if rows.has(key, fingerprint):
        return key
    bench, classes = bench_of(run.dataset, run.data_path, run.image_size, run.batch_size, run.limit_test)
    run.width, run.num_classes = run.width or default_width(run.arch), run.num_classes or classes
    content = checkpoint.read(file, run, "FOLDER")
    with blaming(f"FOLDER: {file}", ValueError):
        measured = measure(bench, run, content)
    rows.add(dict(zip(KEY, key, strict=True)) | measured | {"fingerprint": fingerprint})
    return key


def run_of(file: Path, data_path: Path) -> argparse.Namespace:
    """train.py's options: as the scripts called it, or else as the checkpoint has them, which knows no folders."""
    flags = file.with_name("flags")
    if flags.is_file():
        try:
            return options.parse(shlex.split(flags.read_text(), comments=True))
        except SystemExit as error:
            raise ValueError(f"FOLDER: expected {flags} to hold flags of train.py; the message above says what is wrong") from error
    return argparse.Namespace(**vars(options.parse([])) | trained.options_of(file) | {"data_path": data_path})


def measure(bench: Bench, run: argparse.Namespace, content: dict) -> dict:
    """The measured columns of the training that train.py's options `run` describe, at the checkpoint `content`."""
    method = "qat" if run.weights else "fp32"
    found = bench.measure(method, run, content)
    return {
        "width": run.width,
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
    sys.exit(said(main))
