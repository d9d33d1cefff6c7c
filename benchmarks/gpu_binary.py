"""Binary layers on a GPU beside cuDNN and cuBLAS: ResNet-18's 3x3 convolutions and a 4096 x 4096 linear layer.

python benchmarks/gpu_binary.py [--batches 1 32 256] [--rounds 30] [--output FILE]

Sides: fp16, TF32 and fp32 through PyTorch (fp16 and TF32 channels last; cuDNN chooses its algorithms by trial), and the packed layer from
floats to floats and from bits to bits. Every side is a CUDA graph of CALLS calls, so that what is timed is the device; sides take turns.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_kernels import times
from results import write

import quantize  # noqa: F401  registers the ops
from quantize.packed.binary_panels import binary_codes, binary_panels, tap_sums
from quantize.packed.layout import to_rows

CALLS = 10
CONVS = {"64 @ 56": (64, 56), "128 @ 28": (128, 28), "256 @ 14": (256, 14), "512 @ 7": (512, 7)}  # channels in and out, height and width
FEATURES = 4096
ops = torch.ops.quantize


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
    return captured.replay


def with_tf32(allowed: bool, run):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        return graph(run)
    finally:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def packed(weight):
    """What the ops take of signs [N, C, *kernel], from the codes to the scales."""
    rows = to_rows(weight)
    codes, channels = binary_codes(rows), weight.shape[1]
    made = binary_panels(codes, rows.shape[1]), tap_sums(codes, rows.shape[1] // channels, channels)
    return [t.cuda() for t in (codes, *made, torch.rand(len(weight)))]


def measure(sides: dict, macs: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a call, times fp16's, and multiply-adds a second."""
    seconds = {name: s / CALLS for name, s in times(sides, rounds).items()}
    return {name: {"seconds": s, "speedup_over_fp16": seconds["fp16"] / s, "tmac_per_s": macs / s / 1e12} for name, s in seconds.items()}


def conv(channels: int, size: int, batch: int, rounds: int):
    weight = torch.randint(2, (channels, channels, 3, 3)).float().mul_(2).sub_(1)
    x, w, made = torch.randn(batch, channels, size, size, device="cuda"), weight.cuda(), packed(weight)
    last, w_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    half, w_half = last.half(), w_last.half()
    threshold, geometry = torch.zeros(channels, dtype=torch.int32, device="cuda"), (channels, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    op = ops.packed_binary_conv2d
    bits = op(x, None, None, False, *made, None, threshold, None, *geometry)
    sides = {
        "fp16": graph(lambda: F.conv2d(half, w_half, padding=1)),
        "tf32": with_tf32(True, lambda: F.conv2d(last, w_last, padding=1)),
        "fp32": with_tf32(False, lambda: F.conv2d(x, w, padding=1)),
        "floats to floats": graph(lambda: op(x, None, None, False, *made, None, None, None, *geometry)),
        "floats to floats, channels last": graph(lambda: op(last, None, None, False, *made, None, None, None, *geometry)),
        "bits to floats": graph(lambda: op(bits, None, None, False, *made, None, None, None, *geometry)),
        "bits to bits": graph(lambda: op(bits, None, None, False, *made, None, threshold, None, *geometry)),
    }
    return measure(sides, batch * size**2 * channels**2 * 9, rounds)


def linear(batch: int, rounds: int):
    weight = torch.randint(2, (FEATURES, FEATURES)).float().mul_(2).sub_(1)
    x, w, made = torch.randn(batch, FEATURES, device="cuda"), weight.cuda(), packed(weight)
    half, w_half, op = x.half(), w.half(), ops.packed_binary_linear
    threshold = torch.zeros(FEATURES, dtype=torch.int32, device="cuda")
    bits = op(x, None, None, False, *made, None, threshold, None, FEATURES)
    sides = {
        "fp16": graph(lambda: F.linear(half, w_half)),
        "tf32": with_tf32(True, lambda: F.linear(x, w)),
        "fp32": with_tf32(False, lambda: F.linear(x, w)),
        "floats to floats": graph(lambda: op(x, None, None, False, *made, None, None, None, FEATURES)),
        "bits to bits": graph(lambda: op(bits, None, None, False, *made, None, threshold, None, FEATURES)),
    }
    return measure(sides, batch * FEATURES**2, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="instead of results/gpu_binary.json")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    results = {}
    for batch in args.batches:
        layers = {name: conv(*shape, batch, args.rounds) for name, shape in CONVS.items()}
        layers[f"linear {FEATURES}"] = linear(batch, args.rounds)
        for name, sides in layers.items():
            results[f"{name}, batch {batch}"] = sides
            figures = ", ".join(f"{side} {1e6 * s['seconds']:.1f} us" for side, s in sides.items())
            print(f"{name}, batch {batch}: {figures}")
    write("gpu_binary", {"calls_a_graph": CALLS, "rounds": args.rounds, "results": results}, args.output)


if __name__ == "__main__":
    main()
