#!/usr/bin/env python3
"""Train a ResNet-20 on 4,000 handwritten digits twice, plain and with activations kept at 2 bits for backward, and compare.

    python examples/demo.py        # about two minutes on two cores; ends with a table and demo/demo.png

Each training is a process of its own, so that its memory is its own: the growth of its resident set from just before the first step to the
highest point. Steps are timed afterwards, plain and compressed in turn, so that both meet the same machine.

Everything runs with MALLOC set, below: glibc's malloc otherwise keeps the blocks that are freed too scattered to be used again, and a
process shows little of what it saves (README.md, "Memory of a CPU process").
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import quantize

import logs
import options
import train
from engine import Run, show, train_step
from memory import MIB
from processes import Processes

HERE = Path(__file__).parent
RECIPE = "--arch resnet20 --dataset mnist5k --batch-size 128 --lr 0.2 --weight-decay 5e-4 --channels-last --device cpu"
RUNS = {"plain": "-c fanin", "2 bits": "-c quantize --cabits 2 --ibits 2"}
MALLOC = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
TIMED_STEPS = 12  # of each model; the first two warm up


def main(argv: list[str] | None = None) -> None:
    """Train, measure, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for logs, table and plot (default: demo)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each training (default: 8)")
    parser.add_argument("flags", nargs="*", help="more flags for both trainings, after --")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    flags = {name: [*RECIPE.split(), *own.split(), "--epochs", str(args.epochs), *args.flags] for name, own in RUNS.items()}
    for own in flags.values():
        asked = options.parse(own)  # a bad flag ends here, with train.py's words
        for name in ("evaluate", "training_only"):
            if getattr(asked, name):
                parser.error(f"--{name.replace('_', '-')} does not belong here: the table has the accuracy after training")
    entries = {}
    for name in RUNS:
        workspace = args.output / name.replace(" ", "-")
        print(f"\n{name}: python examples/train.py {' '.join(flags[name])}", flush=True)
        done = subprocess.run([sys.executable, HERE / "train.py", *flags[name], "--workspace", workspace, "--overwrite"])
        if done.returncode:  # it has said why
            sys.exit(done.returncode)
        entries[name] = logs.read(workspace / "log.jsonl")

    print("\nmeasuring steps, plain and compressed in turn ...", flush=True)
    runs = {name: train.prepare(options.parse(flags[name]), Processes.start("cpu")) for name in RUNS}
    batch = next(runs["plain"][1].epoch(0))
    steps = step_times([run for run, _, _ in runs.values()], batch)
    compressed = runs["2 bits"][0]
    report = quantize.memory_report(compressed.model, show(compressed, batch[0], batch[2]))
    saved = [size / len(batch[0]) / MIB for size in (report.baseline_bytes, report.saved_bytes)]
    rows = table(entries, saved, steps)
    (args.output / "summary.json").write_text(json.dumps({"rows": rows, "epochs": entries}, indent=1) + "\n")
    print("\n" + render(rows))
    picture = args.output / "demo.png"
    plot(entries, rows, picture)
    print(f"\nplot: {picture.resolve()}\n{time.perf_counter() - began:.0f} s in all")


def step_times(runs: list[Run], batch) -> list[float]:
    """Median step time in ms of each run, its steps taking turns with the others'."""
    times = [[] for _ in runs]
    for run in runs:
        run.net.train()
    for _ in range(TIMED_STEPS):
        for run, own in zip(runs, times, strict=True):
            before = time.perf_counter()
            train_step(run, *batch)
            own.append(1000 * (time.perf_counter() - before))
    return [statistics.median(own[2:]) for own in times]


def table(entries: dict, saved: list[float], steps: list[float]) -> list[dict]:
    """What was measured: a row for each quantity, with the plain and the compressed value and how they compare."""
    plain, packed = (entries[name][-1] for name in RUNS)
    ratio = "{:.1f}x less"
    rows = [
        ("test accuracy", "%", plain["test_top1"], packed["test_top1"], "{:+.1f} points".format(packed["test_top1"] - plain["test_top1"])),
        ("saved for backward", "MiB an image", *saved, ratio.format(saved[0] / saved[1])),
        ("process memory", "MiB", plain["peak_mib"], packed["peak_mib"], ratio.format(plain["peak_mib"] / max(packed["peak_mib"], 1e-9))),
        ("step time, median", "ms", *steps, f"{steps[1] / steps[0]:.2f}x"),
    ]
    return [dict(zip(("quantity", "unit", "plain", "compressed", "comparison"), row, strict=True)) for row in rows]


def render(rows: list[dict]) -> str:
    """The table as text."""
    lines = [f"{'':20} {'':13} {'plain':>9} {'2 bits':>9}", "-" * 68]
    for row in rows:
        digits = 3 if row["unit"] == "MiB an image" else 1
        values = f"{row['plain']:>9.{digits}f} {row['compressed']:>9.{digits}f}"
        lines.append(f"{row['quantity']:20} {row['unit']:13} {values}   {row['comparison']}")
    return "\n".join(lines)


def plot(entries: dict, rows: list[dict], file: Path) -> None:
    """Accuracy by epoch on the left, memory on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(RUNS, ("#8a94a6", "#0b7285"), strict=True))
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.4), width_ratios=(2.2, 1, 1), layout="constrained")
    for name, style in zip(RUNS, ("--", "-"), strict=True):
        accuracy = [entry["test_top1"] for entry in entries[name]]
        epochs = range(1, len(accuracy) + 1)
        left.plot(
            epochs, accuracy, style, marker="o", markersize=5, linewidth=2.2, color=colors[name], label=f"{name}: {accuracy[-1]:.1f} %"
        )
    best = max(entry["test_top1"] for log in entries.values() for entry in log)
    left.set(title="Test accuracy", xlabel="epoch", ylabel="top-1, %", ylim=(max(0, best - 15), min(100.4, best + 1.5)))
    left.set_xticks(list(epochs))
    left.grid(axis="y", color="#e6e9ee")
    left.legend(frameon=False, loc="lower right")
    bars = (
        (middle, rows[1], "Saved for backward\nMiB an image", "{:.2f}"),
        (right, rows[2], "Process memory\nMiB over the start", "{:.0f}"),
    )
    for axes, row, title, form in bars:
        drawn = axes.bar(list(RUNS), (row["plain"], row["compressed"]), color=list(colors.values()), width=0.62)
        axes.bar_label(drawn, [form.format(row[key]) for key in ("plain", "compressed")], padding=3)
        axes.set(title=title, yticks=[], ylim=(0, 1.15 * row["plain"]))
        axes.spines["left"].set_visible(False)
        axes.annotate(row["comparison"], (1, 0.55 * row["plain"]), ha="center", color=colors["2 bits"], fontsize=13, fontweight="bold")
    figure.suptitle("ResNet-20 on 4,000 MNIST images: activations kept for backward, plain and at 2 bits", fontsize=13)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # read when a process starts
    main()
