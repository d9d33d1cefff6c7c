#!/usr/bin/env python3
"""Accuracy against bytes on mnist5k (4,000 images to train, 1,000 to test): DiffQ beside float, uniform and LSQ weights.

    python benchmarks/diffq_accuracy.py                   # trains what runs/diffq_accuracy does not hold, then table and plot
    python benchmarks/diffq_accuracy.py --only fp32 --seeds 1

Every training starts from scratch with the same recipe; all layers are quantized, first and last ones too. Bytes are of the packed file.
"""

import argparse
import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path

import pandas
from paths import EXAMPLES
from results import FOLDER, merged, write
from trainings import folder_of, log, run

RECIPE = "--arch resnet20 --dataset mnist5k --epochs 8 --batch-size 64 --lr 0.1 --weight-decay 5e-4 --channels-last"
TARGETS = (0.12, 0.16)  # MiB; the float model has 1.03
CONFIGURATIONS = {
    "fp32": "",
    "uniform 8 bits": "--weights uniform --weight-bits 8",
    "uniform 4 bits": "--weights uniform --weight-bits 4",
    "LSQ 4 bits": "--weights lsq --weight-bits 4",
    **{f"DiffQ, penalty {p}": f"--weights diffq --group-size 8 --penalty {p}" for p in (1, 5, 20)},
    **{f"DiffQ, target {t} MiB": f"--weights diffq --group-size 8 --target-size {t}" for t in TARGETS},
}


def train(name: str, seed: int, workspace: Path) -> Path:
    """The folder of a finished training."""
    return run(f"{RECIPE} {CONFIGURATIONS[name]} --seed {seed}", folder_of(name, seed, workspace))


def payload_mib(folder: Path) -> float:
    """The file's tensors, which targets are of, by the last log entry; NaN where bits are not learned."""
    return log(folder)[-1].get("size_mib", float("nan"))


def plot(table: pandas.DataFrame, path: Path) -> None:
    """Accuracy over KiB, a mark a training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for (name, rows), marker in zip(table.groupby("name", sort=False), "osd^vP*Xh", strict=False):
        axes.plot(1024 * rows["size_mib"], rows["top1"], marker, label=name, alpha=0.8, markersize=8, linestyle="none")
    axes.set(xscale="log", xlabel="file, KiB", ylabel="top-1 on 1,000 test images, %", ylim=(96, 100))
    axes.set_xticks([100, 200, 500, 1000], ["100", "200", "500", "1000"])
    axes.minorticks_off()
    axes.set_title("ResNet-20 on mnist5k (1,000 images: differences below a point are noise)", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--workspace", type=Path, default=Path("runs/diffq_accuracy"))
    args = parser.parse_args()
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.only]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda job: train(*job, args.workspace), jobs))
    path = args.workspace / "table.csv"
    subprocess.run([sys.executable, EXAMPLES / "zoo.py", "--output", path, *folders], check=True, stdout=subprocess.DEVNULL)
    table = pandas.read_csv(path)
    names_of = dict(zip(jobs, folders, strict=True))
    names = {str(folder / "last.pt"): job for folder, job in zip(folders, jobs, strict=True)}
    table.insert(0, "name", table["checkpoint"].map(lambda file: names.get(file, ("", 0))[0]))
    order = list(CONFIGURATIONS)
    table = (
        table[table["name"] != ""]
        .sort_values("name", key=lambda column: column.map(order.index))
        .drop(columns=["checkpoint", "fingerprint"])
    )
    table["payload_mib"] = [payload_mib(names_of[name, seed]) for name, seed in zip(table["name"], table["seed"], strict=True)]
    for target in TARGETS:
        rows = table["name"] == f"DiffQ, target {target} MiB"
        table.loc[rows, "missed_percent"] = 100 * (table.loc[rows, "payload_mib"] / target - 1)
    print(table.round(3).to_string(index=False))
    runs = merged("diffq_accuracy", "runs", json.loads(table.to_json(orient="records")), by=("name", "seed"), recipe=RECIPE)
    runs = [row for row in runs if row["name"] in CONFIGURATIONS]
    write("diffq_accuracy", {"recipe": RECIPE, "runs": runs})
    plot(pandas.DataFrame(runs), FOLDER / "diffq_accuracy.png")


if __name__ == "__main__":
    main()
