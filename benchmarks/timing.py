"""Interleaved timing: machines are shared and noisy, so sides take turns and ratios are of neighbours in time."""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch

# glibc gives large blocks back and gets fresh pages for the next: faults that are no kernel's, and differ from step to step.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def keep_pages() -> None:
    """Starts the script again with a malloc that keeps what it has: to be called before anything is measured."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def interleave(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, `rounds` times, in turn; `warmup` rounds are not counted.

    Each round has an order of its own: what a side finds in the caches is what the one before it left there.
    """
    times, order, chance = {name: [] for name in sides}, list(sides.items()), random.Random(0)
    for number in range(rounds + warmup):
        chance.shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def summarise(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median and smallest seconds a side, and the median of its ratios to `reference` in the same round."""
    return {
        name: {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "ratio": statistics.median(a / b for a, b in zip(values, times[reference], strict=True)),
        }
        for name, values in times.items()
    }
