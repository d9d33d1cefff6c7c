"""Bandwidth of the CUDA kernels beside a device copy, as a share of the copy's bytes a second.

python benchmarks/gpu_kernels.py [--mib 512] [--rounds 30] [--output FILE]
"""

import argparse
import statistics
from pathlib import Path

import torch
from results import write

import quantize  # noqa: F401  registers the ops

GROUP = 256
ops = torch.ops.quantize


def times(runs: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, by events on the device."""
    taken = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            if number >= 3:
                taken[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(dtype: torch.dtype, mib: int, rounds: int) -> list[dict]:
    """A row for each kernel: seconds, bytes moved, and their rate against the copy's."""
    x = torch.randn(64, mib * 2**20 // dtype.itemsize // 64, device="cuda").to(dtype)
    y, seed = torch.empty_like(x), torch.tensor([1, 2])
    runs, moved = {"copy": lambda: y.copy_(x)}, {"copy": 2 * x.nbytes}
    for bits in (1, 2, 4, 8):
        packed = ops.group_quantize(x, bits, GROUP, seed)
        size = x.nbytes + sum(t.nbytes for t in packed)
        runs[f"quantize {bits} bit"] = lambda bits=bits: ops.group_quantize(x, bits, GROUP, seed)
        runs[f"unpack {bits} bit"] = lambda bits=bits, packed=packed: ops.group_dequantize(
            *packed, None, bits, GROUP, x.shape, x.stride(), dtype, seed
        )
        moved |= {f"quantize {bits} bit": size, f"unpack {bits} bit": size}
    runs["variance"] = lambda: ops.group_variance(x, GROUP)
    mask = ops.clip_mask(x, 0.0, float("nan"), 0.0)[1]
    runs["relu with mask"] = lambda: ops.clip_mask(x, 0.0, float("nan"), 0.0)
    runs["relu backward by mask"] = lambda: ops.apply_mask(x, mask, 1.0, 0.0)
    moved |= {"variance": x.nbytes, "relu with mask": 2 * x.nbytes + mask.nbytes, "relu backward by mask": 2 * x.nbytes + mask.nbytes}
    seconds = times(runs, rounds)
    copy = moved["copy"] / seconds["copy"]
    return [
        {"dtype": str(dtype), "kernel": name, "seconds": s, "gb_per_s": moved[name] / s / 1e9, "share_of_copy": moved[name] / s / copy}
        for name, s in seconds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="instead of results/gpu_kernels.json")
    args = parser.parse_args()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype, args.mib, args.rounds)]
    for row in rows:
        print(f"{row['dtype']:16} {row['kernel']:24} {row['gb_per_s']:8.0f} GB/s   {100 * row['share_of_copy']:5.1f} % of the copy's")
    write("gpu_kernels", {"mib": args.mib, "rounds": args.rounds, "results": rows}, args.output)


if __name__ == "__main__":
    main()
