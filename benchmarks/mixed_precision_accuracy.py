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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        first = run(f"{FIRST} --seed {seed}", RUNS / f"resnet56-seed{seed}") / "last.pt"
        flags = f"{RECIPE} --methods {' '.join(METHODS)} --seed {seed} --init-from {first}"
        report = json.loads((run(flags, RUNS / f"allocate-seed{seed}", "allocate.py") / "report.json").read_text())
        print(json.dumps(report)[:1500])


if __name__ == "__main__":
    main()
