"""Trainings that benchmarks stand on: examples/train.py in a folder of its own, done once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from paths import EXAMPLES


def folder_of(name: str, seed: int, workspace: Path) -> Path:
    """Where a configuration's training lies."""
    return workspace / f"{name.replace(' ', '-').replace('/', '-').replace(',', '')}-seed{seed}"


def log(folder: Path) -> list[dict]:
    """The training's epochs."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run(flags: str, folder: Path, script: str = "train.py") -> Path:
    """`folder` with a finished run of examples/`script`; one that was interrupted goes on, one that is finished is left alone."""
    flags = f"{flags} --workspace {folder}"
    known = (folder / "flags").exists() and (folder / "flags").read_text().strip() == flags
    if known and (folder / "report.json").exists():
        return folder
    if not known:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flags").write_text(flags + "\n")
    resume = ["--resume", folder / "last.pt"] if script == "train.py" and (folder / "last.pt").exists() else []
    began = time.perf_counter()
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, EXAMPLES / script, *flags.split(), *resume]
        subprocess.run(command, check=True, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    report = json.loads((folder / "report.json").read_text())
    shown = f"{report['last_top1']:.2f} % " if "last_top1" in report else ""
    print(f"{folder.name}: {shown}in {time.perf_counter() - began:.0f} s", flush=True)
    return folder
