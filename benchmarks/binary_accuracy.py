#!/usr/bin/env python3
"""Binary, ternary and DoReFa-Net's weights on mnist5k (4,000 images to train, 1,000 to test): accuracy, bytes, speed and arithmetic.

    python benchmarks/binary_accuracy.py                   # trains what runs/binary_accuracy does not hold, then the table
    python benchmarks/binary_accuracy.py --only "xnor a1w1" "dorefa a2w2" --seeds 1

All are resnet20_q, ResNet-20 in the order batch norm, clip, convolution (examples/models/binary.py), with the first convolution and the
last layer in full precision. Each seed is trained in full precision, and every configuration, the baseline too, goes on from there with
the same recipe. Accuracy is that after the last epoch; accuracy, bytes and latency are of the packed model, loaded back from its file.
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path

import pandas
from paths import EXAMPLES
from results import merged, write
from trainings import folder_of, log, run

BINARY = "--arch resnet20_q --dataset mnist5k --width 8 --batch-size 32 --lr 0.1 --channels-last"
FIRST = f"{BINARY} --epochs 6"
RECIPE = f"{BINARY} --epochs 3 --lr-warmup-epochs 0.5"
DOREFA = "--weights dorefa --weight-bits"
HELD = f"{DOREFA} 2 --lr-scheduler step --lr-milestones 99"  # the rate stays at 0.1, where DoReFa-Net's published form is unstable
BASELINE = "baseline"
# All methods with the recipe's cosine, then DoReFa's two remedies one by one, which the lines before have both.
CONFIGURATIONS = {
    BASELINE: "",
    "xnor a1w1": "--weights xnor",
    "xnor a1w1, rectified, polynomial": "--weights xnor --rectify 0.99 --sign-gradient polynomial",
    "ternary a32w2": "--weights ternary --float-layers conv1 fc",
    **{f"dorefa a{bits}w{bits}": f"{DOREFA} {bits}" for bits in (1, 2, 4, 8, 16)},
    "dorefa a2w2, rate held, published": f"{HELD} --no-scale-adjusted --reestimate-bn 0",
    "dorefa a2w2, rate held, scale adjusted": f"{HELD} --scale-adjusted --reestimate-bn 0",
    "dorefa a2w2, rate held, statistics anew": f"{HELD} --no-scale-adjusted --reestimate-bn 100",
    "dorefa a2w2, rate held, both": f"{HELD} --scale-adjusted --reestimate-bn 100",
}


def train(name: str, seed: int, workspace: Path) -> Path:
    """The folder of a finished training, after the one that it begins with."""
    first = run(f"{FIRST} --seed {seed}", workspace / f"first-seed{seed}") / "last.pt"
    return run(f"{RECIPE} {CONFIGURATIONS[name]} --seed {seed} --init-from {first}", folder_of(name, seed, workspace))


def measured(folders: dict[tuple[str, int], Path]) -> pandas.DataFrame:
    """A row a training: the packed model's accuracy, bytes and latency, and what the training's own report counts."""
    rows = []
    for (name, seed), folder in folders.items():
        path = folder / "table.csv"  # its own, of one row
        subprocess.run([sys.executable, EXAMPLES / "zoo.py", "--output", path, folder], check=True, stdout=subprocess.DEVNULL)
        row, report = pandas.read_csv(path).iloc[0], json.loads((folder / "report.json").read_text())
        rows.append(
            {
                "name": name,
                "seed": seed,
                "top1": row["top1"],
                "trained_top1": report["last_top1"],
                "best_top1": report["best_top1"],
                "lowest_top1": min(entry["test_top1"] for entry in log(folder)[len(log(folder)) // 2 :]),
                "file_bytes": round(2**20 * row["size_mib"]),
                "not_packed": report["not_packed"],
                "latency1_ms": row["latency1_ms"],
                "float_latency1_ms": row["float_latency1_ms"],
                **{key: report[key] for key in ("parameters", "macs", "macs_by_bits", "bit_ops", "duration_seconds")},
                "test_top1_by_epoch": [entry["test_top1"] for entry in log(folder)],
                "train_top1_by_epoch": [entry["train_top1"] for entry in log(folder)],
            }
        )
    return pandas.DataFrame(rows)


def summary(table: pandas.DataFrame) -> list[dict]:
    """A row a configuration: mean and spread over the seeds, and what they have in common."""
    rows = []
    for name, part in table.groupby("name", sort=False):
        first = part.iloc[0]
        rows.append(
            {
                "name": name,
                "seeds": len(part),
                "top1": part["top1"].mean(),
                "spread": part["top1"].std() if len(part) > 1 else None,
                "lowest_top1": part["lowest_top1"].min(),
                "file_bytes": int(first["file_bytes"]),
                "latency1_ms": part["latency1_ms"].median(),
                "float_latency1_ms": part["float_latency1_ms"].median(),
                "bit_ops": int(first["bit_ops"]),
                "macs_by_bits": first["macs_by_bits"],
                "not_packed": first["not_packed"] if isinstance(first["not_packed"], str) else None,  # pandas' NaN
            }
        )
    return rows


def render(rows: list[dict]) -> str:
    """The table as text."""
    lines = [f"{'':40} {'seeds':>5} {'top-1, %':>13} {'lowest':>7} {'bytes':>9} {'ms (float)':>13}  multiply-accumulates by bits"]
    for row in rows:
        top1 = f"{row['top1']:.2f}" + (f" ± {row['spread']:.2f}" if row["spread"] is not None else "")
        macs = ", ".join(f"{count / 1e6:.2f} M {bits}" for bits, count in row["macs_by_bits"].items())
        speed = f"{row['latency1_ms']:.2f} ({row['float_latency1_ms']:.2f})"
        lines.append(
            f"{row['name']:40} {row['seeds']:>5} {top1:>13} {row['lowest_top1']:>7.2f} {row['file_bytes']:>9,} {speed:>13}  {macs}"
        )
    return "\n".join(lines) + "\nlowest: worst test of any seed in the second half of the epochs"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--workspace", type=Path, default=Path("runs/binary_accuracy"))
    args = parser.parse_args()
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.only]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(jobs, pool.map(lambda job: train(*job, args.workspace), jobs), strict=True))
    folders = {(name, seed): done[name, seed] for name in args.only for seed in range(args.seeds)}
    recipe, runs = {"first": FIRST, "recipe": RECIPE}, json.loads(measured(folders).to_json(orient="records"))
    runs = merged("binary_accuracy", "runs", runs, by=("name", "seed"), **recipe)
    runs = [row for row in runs if row["name"] in CONFIGURATIONS]
    table = summary(pandas.DataFrame(runs))
    print(render(table))
    write("binary_accuracy", {**recipe, "table": table, "runs": runs})


if __name__ == "__main__":
    main()
