"""What other people's models keep for the backward at 2 bits, unchanged: torchvision's and timm's, in training mode, fp32.

python benchmarks/other_models.py [--batch 4] [--only resnet]     # needs torchvision and timm
"""

import argparse
import sys
from collections import Counter

import paths  # noqa: F401
import torch
from catalog import MODELS
from results import write

import quantize


def measure(entry, batch: int) -> dict:
    """MiB saved by the plain model and at 2 bits, and what of the latter is in full precision, by op and reason."""
    torch.manual_seed(0)
    model = quantize.QModule(entry.build(entry.large), quantize.ActivationConfig(bits=2, max_bits=2))
    report = quantize.memory_report(model, entry.inputs(batch, entry.large))
    left = Counter()
    for row in report.layers:
        if row.reason:
            left[row.op, row.reason] += row.bytes / 2**20
    return {
        "size": entry.large,
        "plain_mib": report.baseline_bytes / 2**20,
        "saved_mib": report.saved_bytes / 2**20,
        "ratio": report.ratio,
        "below_ten_because": entry.below or None,
        "transformer": entry.transformer,
        "full_precision": [{"op": op, "reason": reason, "mib": mib} for (op, reason), mib in left.most_common()],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", default="", help="models with this in their name; nothing is written")
    args = parser.parse_args()
    print(f"saved for backward, MiB, batch {args.batch}")
    print(f"{'model':36} {'size':>4} {'plain':>9} {'2 bits':>8} {'ratio':>6}  most of what is left in full precision")
    results, missed = {}, []
    for entry in MODELS:
        if args.only not in entry.key:
            continue
        row = results[entry.key] = measure(entry, args.batch)
        left = row["full_precision"][0] if row["full_precision"] else None
        largest = f"{left['op']} {left['mib']:.2f}: {left['reason']}" if left and left["mib"] > 0.02 * row["saved_mib"] else ""
        print(f"{entry.key:36} {row['size']:4} {row['plain_mib']:9.1f} {row['saved_mib']:8.2f} {row['ratio']:6.1f}  {largest}", flush=True)
        if row["ratio"] < 10 and not entry.below:
            missed.append(entry.key)
    if not args.only:
        write("other_models", {"batch": args.batch, "bits": 2, "group_size": 256, "results": results})
    if missed:
        sys.exit(f"below ten times: {', '.join(missed)}")


if __name__ == "__main__":
    main()
