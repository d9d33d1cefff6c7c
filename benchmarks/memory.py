"""What ResNet-50 at 224x224 keeps for the backward, counted on live storages, and what a training process takes.

python benchmarks/memory.py [--batch 16]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from models import create_model
from results import write

import quantize

CONFIGS = {
    "plain": None,
    "2 bits": quantize.ActivationConfig(bits=2, max_bits=2),
    "2 bits, adaptive": quantize.ActivationConfig(bits=2),
    "4 bits": quantize.ActivationConfig(bits=4, max_bits=4),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model("resnet50", num_classes=1000, in_channels=3)
    return model if CONFIGS[name] is None else quantize.QModule(model, CONFIGS[name])


def resident(field: str) -> float:
    """MiB of VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def process(name: str, batch: int) -> dict:
    """Runs in a process of its own: growth of the resident set over one step, gradients included."""
    model = build(name)
    target = torch.randint(1000, (batch,))
    F.cross_entropy(model(torch.randn(1, 3, 224, 224).expand(2, -1, -1, -1)), target[:1].expand(2)).backward()  # libraries, gradients
    x = torch.randn(batch, 3, 224, 224)
    before = resident("VmRSS")
    loss = F.cross_entropy(model(x), target)
    held = resident("VmRSS") - before
    loss.backward()
    return {"after_forward_mib": held, "peak_mib": resident("VmHWM") - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--process", choices=CONFIGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        print(json.dumps(process(args.process, args.batch)))
        return
    x = torch.randn(args.batch, 3, 224, 224)
    results = {}
    print(f"ResNet-50, 224x224, fp32, batch {args.batch}, MiB an image")
    print(f"{'':18} {'saved':>8} {'times less':>11} {'process, after forward':>24} {'process, peak':>14}")
    for name in CONFIGS:
        report = quantize.memory_report(build(name), x)
        command = [sys.executable, __file__, "--process", name, "--batch", str(args.batch)]
        # glibc keeps freed blocks that its heap has grown to hold; a fixed threshold gives every large tensor back when it dies.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        per_image = {k: v / args.batch for k, v in grown.items()}
        saved = report.saved_bytes / 2**20 / args.batch
        results[name] = {"saved_mib_per_image": saved, "ratio": report.ratio, **{f"process_{k}_per_image": v for k, v in per_image.items()}}
        print(f"{name:18} {saved:8.2f} {report.ratio:11.1f} {per_image['after_forward_mib']:24.1f} {per_image['peak_mib']:14.1f}")
    write("memory", {"model": "resnet50", "size": 224, "batch": args.batch, "results": results})


if __name__ == "__main__":
    main()
