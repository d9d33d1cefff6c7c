"""Interleaved timing: machines are shared and noisy, so sides take turns and ratios are of neighbours in time."""

import statistics
import time
from collections.abc import Callable

import torch


def interleave(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, `rounds` times, in turn; `warmup` rounds are not counted."""
    times = {name: [] for name in sides}
    for number in range(rounds + warmup):
        for name, run in sides.items():
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
