"""ResNet-18's 3x3 convolutions and a 4096 x 4096 linear layer on a GPU, for the benchmarks of packed layers.

fp16, TF32 and fp32 through PyTorch (fp16 and TF32 convolutions channels last; cuDNN chooses its algorithms by trial) stand beside the
packed layers. Every side is a CUDA graph of CALLS calls, so that what is timed is the device; sides take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_kernels import times
from results import write

CALLS = 10
CONVS = {"64 @ 56": (64, 56), "128 @ 28": (128, 28), "256 @ 14": (256, 14), "512 @ 7": (512, 7)}  # channels in and out, height and width
FEATURES = 4096


def graph(run):
    """`run`, CALLS times, as one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(CALLS):
            run()

    def replay():
        captured.replay()

    replay.reads = run  # whose tensors live as long as the graph
    return replay


def with_tf32(allowed: bool, run):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        return graph(run)
    finally:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def measure(sides: dict, macs: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a call, times fp16's, and multiply-adds a second."""
    seconds = {name: s / CALLS for name, s in times(sides, rounds).items()}
    return {name: {"seconds": s, "speedup_over_fp16": seconds["fp16"] / s, "tmac_per_s": macs / s / 1e12} for name, s in seconds.items()}


def conv_references(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable]:
    """PyTorch's sides of a 3x3 convolution."""
    last, w_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    half, w_half = last.half(), w_last.half()
    return {
        "fp16": graph(lambda: F.conv2d(half, w_half, padding=1)),
        "tf32": with_tf32(True, lambda: F.conv2d(last, w_last, padding=1)),
        "fp32": with_tf32(False, lambda: F.conv2d(x, weight, padding=1)),
    }


def linear_references(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable]:
    """PyTorch's sides of a linear layer."""
    half, w_half = x.half(), weight.half()
    return {
        "fp16": graph(lambda: F.linear(half, w_half)),
        "tf32": with_tf32(True, lambda: F.linear(x, weight)),
        "fp32": with_tf32(False, lambda: F.linear(x, weight)),
    }


def run(name: str, doc: str, conv: Callable, linear: Callable) -> None:
    """A benchmark: conv(channels, size, batch) and linear(batch) give the sides."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help=f"instead of results/{name}.json")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    results = {}
    for batch in args.batches:
        layers = {layer: (partial(conv, *shape, batch), batch * shape[1] ** 2 * shape[0] ** 2 * 9) for layer, shape in CONVS.items()}
        layers[f"linear {FEATURES}"] = partial(linear, batch), batch * FEATURES**2
        for layer, (sides, macs) in layers.items():
            found = results[f"{layer}, batch {batch}"] = measure(sides(), macs, args.rounds)
            print(f"{layer}, batch {batch}: " + ", ".join(f"{side} {1e6 * s['seconds']:.1f} us" for side, s in found.items()), flush=True)
    write(name, {"calls_a_graph": CALLS, "rounds": args.rounds, "results": results}, args.output)
