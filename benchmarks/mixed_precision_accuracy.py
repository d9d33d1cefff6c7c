#!/usr/bin/env python3
"""ResNet-56 on mnist5k (4,000 images to train, 1,000 to test) at 2.5, 3 and 4 average bits: accuracy by who chose the bits.

    python benchmarks/mixed_precision_accuracy.py      # trains what runs/mixed_precision does not hold, then the table

Weights have 2, 4 or 8 bits, inputs are not quantized. Each seed's float model is trained, measured on 256 training images, and every
allocation is fine-tuned with the same recipe for one epoch, packed, saved and loaded back; accuracy and bytes are the file's. Uniform bits
are the most that fit the budget: 2 at 2.5 and 3. All by examples/allocate.py, one thread.
"""

import argparse
import json
from pathlib import Path

import pandas
from results import write
from trainings import run

FIRST = "--arch resnet56 --dataset mnist5k --batch-size 64 --lr 0.1 --epochs 6 --channels-last"
METHODS = ("uniform", "zeroq", "gauss_newton", "composed")
RECIPE = "--arch resnet56 --dataset mnist5k --average-bits 2.5 3 4 --choices 2 4 8 --epochs 1 --lr 0.02 --batch-size 64 --channels-last"
RUNS = Path("runs/mixed_precision")


def summary(table: pandas.DataFrame) -> list[dict]:
    """A row a method and budget: over the seeds."""
    rows = []
    for (budget, method), part in table.groupby(["budget", "method"], sort=False):
        row = {"budget": budget, "method": method, "seeds": len(part)}
        for name in ("top1_packed", "top1_before", "true_kl"):
            row[name] = part[name].mean()
        row["spread"] = part["top1_packed"].std() if len(part) > 1 else None
        row["file_bytes"] = round(part["file_bytes"].mean())
        row["worst_prediction"] = int((part["stored_bytes"] - part["predicted_bytes"]).abs().max())
        row["proven"] = bool(part["proven"].dropna().all())
        rows.append(row)
    return rows


def render(rows: list[dict], first: dict) -> str:
    """The table as text."""
    lines = [f"{'bits':>5} {'':14} {'top-1, %':>13} {'before':>7} {'true KL':>9} {'file bytes':>11}  bytes off, proven"]
    for row in rows:
        top1 = f"{row['top1_packed']:.2f}" + (f" ± {row['spread']:.2f}" if row["spread"] is not None else "")
        lines.append(
            f"{row['budget']:>5} {row['method']:14} {top1:>13} {row['top1_before']:>7.2f} {row['true_kl']:>9.4f} {row['file_bytes']:>11,}  "
            f"{row['worst_prediction']}, {row['proven']}"
        )
    return "\n".join(lines) + f"\nfloat: {first['top1']:.2f} % in {first['bytes']:,} bytes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows, floats = [], []
    for seed in args.seeds:
        first = run(f"{FIRST} --seed {seed}", RUNS / f"resnet56-seed{seed}") / "last.pt"
        flags = f"{RECIPE} --methods {' '.join(METHODS)} --seed {seed} --init-from {first}"
        report = json.loads((run(flags, RUNS / f"allocate-seed{seed}", "allocate.py") / "report.json").read_text())
        floats.append(report["float"])
        rows += [{"seed": seed, "proven": None, **row} for row in report["rows"]]
    table, first = summary(pandas.DataFrame(rows)), pandas.DataFrame(floats).mean().to_dict()
    print(render(table, first))
    runs = [{name: value for name, value in row.items() if name != "choice"} for row in rows]
    choices = [
        {**{name: row[name] for name in ("seed", "method", "budget")}, "weight_bits": " ".join(str(w) for w, _ in row["choice"].values())}
        for row in rows
    ]
    write("mixed_precision_accuracy", {"first": FIRST, "recipe": RECIPE, "float": first, "table": table, "runs": runs, "choices": choices})


if __name__ == "__main__":
    main()
