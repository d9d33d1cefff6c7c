#!/usr/bin/env python3
"""Accuracy on mnist5k (4,000 images to train, 1,000 to test) of ResNet-20 trained with compressed activations, beside fp32.

    python benchmarks/accuracy.py                     # everything that results/accuracy.json does not hold yet
    python benchmarks/accuracy.py --arch mobilevit    # the same of MobileViT: attention, layer norms, SiLU
    python benchmarks/accuracy.py --seeds 1 --only fp32 "2/2 group"
    python benchmarks/accuracy.py --seeds 0           # print the table of what is there

The bar: the 95 % interval of the difference of means to fp32 must not lie wholly below -0.3 points, for the configurations with
several seeds. The configurations are those of ActNN's CIFAR table: bits / most bits, group or sample range, what adapts; and
compress_once (`once`).
"""

import argparse
import concurrent.futures
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import results
import trainings
from machine import describe

BAR = -0.3  # points
DIVERGED = re.compile("loss is (nan|-?inf) ")  # how train.py ends then
RECIPE = "--dataset mnist5k --epochs 10 --batch-size 64 --lr 0.1 --weight-decay 5e-4 --channels-last"
ARCHITECTURES = {"resnet20": "accuracy", "mobilevit": "accuracy_mobilevit"}  # to their result files
CONFIGURATIONS = {
    "fp32": "-c fanin",
    "4/4": "-c quantize --cabits 4 --ibits 4 --no-pergroup --no-perlayer",
    "2/2": "-c quantize --cabits 2 --ibits 2 --no-pergroup --no-perlayer",
    "2/2 group": "-c quantize --cabits 2 --ibits 2 --no-perlayer",
    "2/8 group": "-c quantize --cabits 2 --ibits 8 --no-perlayer",
    "2/8 group gradient": "-c quantize --cabits 2 --ibits 8 --no-perlayer --usegradient",
    "2/8 group layer": "-c quantize --cabits 2 --ibits 8",
    "2/8 group layer gradient": "-c quantize --cabits 2 --ibits 8 --usegradient",
    "2/2 group once": "-c quantize --cabits 2 --ibits 2 --no-perlayer --once",
    "4/4 group once": "-c quantize --cabits 4 --ibits 4 --no-perlayer --once",
}
# Fixed and adaptive 2 bits, and nothing kept for convolutions behind norms: these and fp32 get every seed, the others one.
BARRED = ("2/2 group", "2/8 group layer", "2/2 group once", "4/4 group once")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet20", help="model (default resnet20)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of fp32 and of fixed and adaptive 2 bits (default 5)")
    parser.add_argument("--other-seeds", type=int, default=1, help="seeds of the other configurations (default 1)")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), help="run these configurations only")
    parser.add_argument("--jobs", type=int, default=describe()["cores"], help="runs at a time, one thread each (default: the cores)")
    parser.add_argument("--workspace", type=Path, help="folder of the runs (default runs/ and the result file's name)")
    parser.add_argument("--output", type=Path, help="result file (default that of --arch in results/)")
    args = parser.parse_args()
    name = ARCHITECTURES[args.arch]
    workspace, output = args.workspace or Path("runs") / name, args.output or results.FOLDER / f"{name}.json"

    held = json.loads(output.read_text()) if output.exists() else {"machine": None, "runs": []}
    runs = [{"machine": held["machine"], **run} for run in held["runs"] if run["flags"] == flags_of(args.arch, run["configuration"])]
    done = {(run["configuration"], run["seed"]) for run in runs}
    counts = {name: args.seeds if name in ("fp32", *BARRED) else min(args.seeds, args.other_seeds) for name in args.only}
    waiting = [(name, seed) for seed in range(args.seeds) for name, count in counts.items() if seed < count and (name, seed) not in done]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for number, run in enumerate(pool.map(lambda job: train(args.arch, *job, workspace), waiting), 1):
            runs.append(run)
            outcome = run.get("diverged") or f"{run['top1']:.2f} % in {run['seconds']:.0f} s"
            print(f"{number}/{len(waiting)}: {run['configuration']}, seed {run['seed']}: {outcome}", flush=True)
            write(name, output, runs)
    write(name, output, runs)
    rows = table(runs)
    print(render(rows))
    return int(any(row["passes"] is False for row in rows))


def flags_of(arch: str, configuration: str) -> str:
    """train.py's flags for a configuration, without its seed."""
    return f"--arch {arch} {RECIPE} {CONFIGURATIONS.get(configuration)}"


def train(arch: str, configuration: str, seed: int, workspace: Path) -> dict:
    """What one training comes to."""
    flags, folder = flags_of(arch, configuration), trainings.folder_of(configuration, seed, workspace)
    known = {"configuration": configuration, "seed": seed, "flags": flags}
    try:
        log = trainings.log(trainings.run(f"{flags} --seed {seed}", folder))
    except subprocess.CalledProcessError:
        last = (folder / "output.txt").read_text().splitlines()[-1]
        if not DIVERGED.search(last):
            raise
        return known | {"top1": None, "diverged": last.removeprefix("train.py: ")}
    return known | {
        "top1": log[-1]["test_top1"],  # of the last epoch, not of the best
        "test_loss": log[-1]["test_loss"],
        "saved_mib_per_image": log[-1]["saved_mib_per_image"],
        "seconds": sum(entry["seconds"] for entry in log),
    }


def table(runs: list[dict]) -> list[dict]:
    """A row per configuration that was run: mean, deviation, difference to fp32 with its interval, and whether that passes the bar."""
    top1 = {name: [run["top1"] for run in runs if run["configuration"] == name and run["top1"] is not None] for name in CONFIGURATIONS}
    rows = []
    for name, values in top1.items():
        diverged = sum(run["configuration"] == name and run["top1"] is None for run in runs)
        row = {"configuration": name, "seeds": len(values), "diverged": diverged, "mean": None, "deviation": None}
        row |= {"difference": None, "interval": None, "passes": False if diverged and name in BARRED else None, "saved_mib_per_image": None}
        if diverged and not values:
            rows.append(row)
        if not values:
            continue
        row["mean"] = statistics.mean(values)
        saved = [run["saved_mib_per_image"] for run in runs if run["configuration"] == name and run["top1"] is not None]
        row["saved_mib_per_image"] = statistics.mean(saved)
        if len(values) > 1:
            row["deviation"] = statistics.stdev(values)
        if name != "fp32" and top1["fp32"]:
            row["difference"] = row["mean"] - statistics.mean(top1["fp32"])
            if min(len(values), len(top1["fp32"])) > 1:
                row["interval"] = welch(values, top1["fp32"])
                row["passes"] = row["interval"][1] >= BAR and not diverged if name in BARRED else None
        rows.append(row)
    return rows


def welch(left: list[float], right: list[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of mean(left) - mean(right) for samples of unequal variance (Welch 1947, with Satterthwaite's degrees of freedom)."""
    from scipy.stats import t

    parts = [statistics.variance(values) / len(values) for values in (left, right)]
    difference = statistics.mean(left) - statistics.mean(right)
    if sum(parts) == 0:
        return difference, difference
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (left, right), strict=True))
    width = float(t.ppf((1 + level) / 2, freedom)) * sum(parts) ** 0.5
    return difference - width, difference + width


def render(rows: list[dict]) -> str:
    """The table as text."""
    lines = [f"{'bits/most bits, adapts':26} {'seeds':>5} {'top-1, %':>14} {'to fp32':>8}  {'95 % interval':18} {'MiB/image':>9}"]
    for row in rows:
        if row["mean"] is None:
            lines.append(f"{row['configuration']:26} {row['diverged']:>5} diverged")
            continue
        top1 = f"{row['mean']:.2f}" + (f" ± {row['deviation']:.2f}" if row["deviation"] is not None else "")
        difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
        interval = "" if row["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*row["interval"])
        verdict = {None: "", True: "passes", False: f"FAILS: wholly below {BAR}"}[row["passes"]]
        verdict = f"FAILS: {row['diverged']} more diverged" if row["diverged"] else verdict
        numbers = f"{row['seeds']:>5} {top1:>14} {difference:>8}  {interval:18} {row['saved_mib_per_image']:>9.3f}"
        lines.append(f"{row['configuration']:26} {numbers}  {verdict}")
    return "\n".join(lines)


def write(name: str, file: Path, runs: list[dict]) -> None:
    """Store runs and table."""
    runs = sorted(runs, key=lambda run: (list(CONFIGURATIONS).index(run["configuration"]), run["seed"]))
    arch = next(arch for arch, stem in ARCHITECTURES.items() if stem == name)
    command = f"python benchmarks/accuracy.py --arch {arch}"
    results.write(name, {"command": command, "bar": BAR, "table": table(runs), "runs": runs}, file)


if __name__ == "__main__":
    sys.exit(main())
