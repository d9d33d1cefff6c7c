"""Latency of binary layers (1-bit weights and inputs) at batch 1 on one thread, beside fp32 (oneDNN) and int8 of other libraries.

    python benchmarks/binary.py [--rounds 41] [--threads 1]

Everything takes and returns float tensors: ours compares with thresholds, packs, multiplies, scales and adds on the way; int8 quantizes
and dequantizes. Sides take turns in one process. A turn is several calls, as a network's steady state is: weights of a layer that is
called once in a while come from memory. fp32 uses the best of the machine on every row; "fp32, AVX2" is the same in a process of its own
under ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2, measured in between by --reference.
"""

import argparse
import json
import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from int8_peers import peers
from results import write
from timing import interleave, keep_pages, summarise
from torch import nn

from quantize import _C
from quantize.packed.binary_panels import binary_codes, binary_panels, tap_sums
from quantize.packed.layout import to_rows

CONVS = [(256, 14), (64, 56), (16, 32), (128, 28), (512, 7), (32, 16), (64, 8)]  # 3x3, channels in and out, size
LINEARS = [(4096, 1), (1024, 1), (4096, 32)]  # features in and out, batch
ops = torch.ops.quantize


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(2, shape).float().mul_(2).sub_(1)


def layer_of(kind: str, size: int) -> nn.Module:
    layer = nn.Linear(size, size, bias=False) if kind == "linear" else nn.Conv2d(size, size, 3, padding=1, bias=False)
    layer.weight.data = signs(*layer.weight.shape) * 0.02
    return layer.eval()


def binary(layer: nn.Module, x: torch.Tensor):
    """A function that runs `layer`'s signs on the signs of x - threshold by the packed kernels."""
    rows = to_rows(layer.weight.detach())
    channels, outputs = layer.weight.shape[1], len(rows)
    taps, codes = rows.shape[1] // channels, binary_codes(rows)
    threshold, flip = torch.randn(channels) * 0.1, torch.randint(2, (channels,), dtype=torch.uint8)
    weights = (codes, binary_panels(codes, rows.shape[1]), tap_sums(codes, taps, channels))
    scales, bias = torch.rand(outputs), torch.randn(outputs)
    arguments = (threshold, flip, False, *weights, scales, bias, None, None, channels)
    shape = (-1, *[1] * (x.dim() - 2))
    inputs = torch.where((x < threshold.view(shape)) ^ flip.bool().view(shape), -1.0, 1.0).double()
    if isinstance(layer, nn.Linear):
        op = ops.packed_binary_linear.default
        dot = inputs @ layer.weight.detach().sign().double().T
        want = dot.float() * scales + bias
    else:
        op, arguments = ops.packed_binary_conv2d.default, (*arguments, [3, 3], [1, 1], [1, 1], [1, 1], 1)
        dot = F.conv2d(inputs, layer.weight.detach().sign().double(), padding=1)
        want = dot.float() * scales.view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert torch.equal(op(x, *arguments), want), "the packed layer is not the simulated one"
    return lambda: op(x, *arguments)


def inputs(kind: str, size: int, other: int) -> torch.Tensor:
    return torch.randn(other, size) if kind == "linear" else torch.randn(1, size, other, other)


def cases():
    yield from (("conv", *case) for case in CONVS)
    yield from (("linear", *case) for case in LINEARS)


def name_of(kind: str, size: int, other: int) -> str:
    return f"linear {size}x{size}, batch {other}" if kind == "linear" else f"conv 3x3, {size}@{other}x{other}"


def turn(run, calls: int, isa: str | None = None):
    def repeat():
        if isa:
            _C.set_cpu_isa(isa)
        for _ in range(calls):
            run()

    return repeat


def calls_of(kind: str, size: int, other: int) -> int:
    return 20 if kind == "conv" and size * other <= 1024 and size <= 64 else 3


def measure(case: tuple, args) -> dict:
    kind, size, other = case
    layer, x, calls = layer_of(*case[:2]), inputs(*case), calls_of(*case)
    macs = layer.weight.numel() * (other if kind == "linear" else other**2)
    run = binary(layer, x)
    sides = {"fp32": turn(lambda: layer(x), calls)}
    sides |= {f"binary, {isa}": turn(run, calls, isa) for isa in _C.supported_isas()}
    sides |= {name: turn(peer, calls) for name, peer in peers(layer, x, args.threads).items()}
    with torch.inference_mode():
        taken = interleave(sides, args.rounds, warmup=3)
    times = summarise({label: [t / calls for t in values] for label, values in taken.items()}, "fp32")
    print(f"\n{name_of(*case)}: {macs / 1e6:.1f} M multiply-adds", flush=True)
    result = {}
    for label, t in times.items():
        print(f"  {label:20} {t['median_s'] * 1e6:9.1f} us {macs / t['median_s'] / 1e9:8.1f} GMAC/s {1 / t['ratio']:7.2f} x fp32")
        result[label] = {"median_s": t["median_s"], "min_s": t["min_s"], "gmacs": macs / t["median_s"] / 1e9, "speedup": 1 / t["ratio"]}
    return {"layer": name_of(*case), "macs": macs, "calls_a_turn": calls, "sides": result}


def reference(args) -> list:
    """fp32 and binary on AVX2 alone, interleaved: what a machine without AVX-512 has."""
    _C.set_cpu_isa("avx2")
    found = []
    for case in cases():
        layer, x, calls = layer_of(*case[:2]), inputs(*case), calls_of(*case)
        run = binary(layer, x)
        with torch.inference_mode():
            taken = interleave({"fp32": turn(lambda layer=layer, x=x: layer(x), calls), "binary": turn(run, calls)}, args.rounds, warmup=3)
        times = summarise({label: [t / calls for t in values] for label, values in taken.items()}, "fp32")
        found.append({"layer": name_of(*case), "fp32_s": times["fp32"]["median_s"], "binary_s": times["binary"]["median_s"]})
        found[-1]["speedup"] = 1 / times["binary"]["ratio"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", action="store_true", help="only fp32 and binary on AVX2, as JSON on the standard output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.reference:
        print(json.dumps(reference(args)))
        return
    results, best = [measure(case, args) for case in cases()], _C.supported_isas()[-1]
    figures = {"threads": args.threads, "rounds": args.rounds, "results": results}
    if best in ("avx512", "amx"):
        only = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
        command = [sys.executable, __file__, "--reference", "--rounds", str(args.rounds), "--threads", str(args.threads)]
        answer = subprocess.run(command, env=os.environ | only, capture_output=True, text=True, check=True).stdout
        figures["avx2_alone"] = json.loads(answer.splitlines()[-1])
        print("\neverything on AVX2")
        for row in figures["avx2_alone"]:
            print(f"  {row['layer']:28} fp32 {row['fp32_s'] * 1e6:9.1f} us, binary {row['binary_s'] * 1e6:8.1f} us: {row['speedup']:.2f} x")
    write("binary", figures)


if __name__ == "__main__":
    keep_pages()
    main()
