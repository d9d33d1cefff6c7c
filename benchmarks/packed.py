"""Latency of packed layers at batch 1 on one thread, beside the same layer in fp32 (oneDNN) and in other libraries' int8.

    python benchmarks/packed.py [--rounds 31] [--threads 1]

Sides take turns, so a call finds its weights in memory rather than in the cache; "20 calls in a row" shows the other case. All sides take
and return float tensors; ours and the int8 libraries quantize the input to 8 bits on the way. "float inputs": no activation
bits, weights decoded on the way.

Then a few layers again where everything keeps to AVX2, as on machines without AVX-512 (binary_models.py says how).
"""

import argparse
import json
import os
import subprocess
import sys

import torch
from binary_models import LESSER
from int8_peers import peers
from results import write
from timing import interleave, keep_pages, summarise
from torch import nn

import quantize

CONVS = [(64, 56), (128, 28), (256, 14), (512, 7), (16, 32), (32, 16), (64, 8)]  # 3x3, channels in and out, size: ResNet-18's, ResNet-20's
CONFIGURATIONS = {
    "8 bits": quantize.Uniform(8, activation_bits=8),
    "4 bits": quantize.Uniform(4, activation_bits=8),
    "2 bits": quantize.Uniform(2, activation_bits=8),
    "PO2+ 4 bits": quantize.PowerOfTwo(4, activation_bits=8),
    "4 bits, float inputs": quantize.Uniform(4),
}
ON_AVX2 = ("conv 3x3, 256@14x14, contiguous", "conv 3x3, 64@56x56, contiguous", "linear 4096x4096")


def packed(layer: nn.Module, x: torch.Tensor, config) -> nn.Module:
    """`layer` packed, calibrated on `x`."""
    model = nn.Sequential(type(layer)(*layer.arguments, **layer.keywords))
    model.load_state_dict({f"0.{key}": value for key, value in layer.state_dict().items()})
    quantize.prepare(model, config)
    if config.activation_bits:
        quantize.calibrate(model, [x], "minmax")
    return quantize.convert(model).eval()[0]


def make(kind: type, *arguments, **keywords) -> nn.Module:
    """A layer that knows how to make another of its kind."""
    layer = kind(*arguments, **keywords).eval()
    layer.arguments, layer.keywords = arguments, keywords
    return layer


def measure(name: str, layer: nn.Module, x: torch.Tensor, args, in_a_row: int = 1) -> dict:
    """One layer, all sides. `in_a_row`: calls a turn; with more than one the weights stay in the cache, if they fit."""
    macs = sum(p.numel() for p in layer.parameters()) * (x[0, 0].numel() if x.dim() == 4 else 1)
    sides = {"fp32": lambda: layer(x)}
    for label, config in CONFIGURATIONS.items():
        if config.activation_bits or isinstance(layer, nn.Linear):
            model = packed(layer, x, config)
            sides[label] = lambda model=model: model(x)
    if not x.is_contiguous():
        sides["PyTorch int8"] = peers(layer, x, args.threads)["PyTorch int8"]
    else:
        sides |= {name: run for name, run in peers(layer, x, args.threads).items() if not (args.reference and "onnxruntime" in name)}
    turns = {label: lambda run=run: [run() for _ in range(in_a_row)] for label, run in sides.items()}
    with torch.inference_mode():
        taken = interleave(turns, args.rounds, warmup=3)
    times = summarise({label: [t / in_a_row for t in values] for label, values in taken.items()}, "fp32")
    print(f"\n{name}: {macs / 1e6:.1f} M multiply-adds")
    result = {}
    for label, t in times.items():
        rate, speed = macs / t["median_s"] / 1e9, times["fp32"]["median_s"] / t["median_s"]
        print(f"  {label:22} {t['median_s'] * 1e6:9.0f} us {rate:8.1f} GMAC/s {1 / t['ratio']:7.2f} x fp32")
        result[label] = {"median_s": t["median_s"], "min_s": t["min_s"], "gmacs": rate, "speedup": 1 / t["ratio"], "of_medians": speed}
    return {"layer": name, "macs": macs, "sides": result}


def cases():
    """(name, layer, input, calls in a row)."""
    for channels, size in CONVS:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(1, channels, size, size).relu_().contiguous(memory_format=layout)
            layer = make(nn.Conv2d, channels, channels, 3, padding=1, bias=False).to(memory_format=layout)
            yield f"conv 3x3, {channels}@{size}x{size}, {str(layout)[6:].replace('_format', '').replace('_', ' ')}", layer, x, 1
    for size in (1024, 4096):
        layer, x = make(nn.Linear, size, size, bias=False), torch.randn(1, size)
        yield f"linear {size}x{size}", layer, x, 1
        yield f"linear {size}x{size}, 20 calls in a row", layer, x, 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=quantize._C.supported_isas(), help="ours on another ISA than the best; nothing is written")
    parser.add_argument("--reference", action="store_true", help="a few layers on this process's ISA, as JSON on the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.isa:
        quantize._C.set_cpu_isa(args.isa)
    results = [measure(name, *rest[:2], args, rest[2]) for name, *rest in cases() if not args.reference or name in ON_AVX2]
    if args.reference:
        print(json.dumps(results))
    elif not args.isa:
        figures = {"threads": args.threads, "rounds": args.rounds, "isa": quantize._C.cpu_isa(), "results": results}
        if "avx2" in quantize._C.supported_isas()[:-1]:
            command = [sys.executable, __file__, "--reference", "--rounds", str(args.rounds), "--threads", str(args.threads)]
            env = os.environ | LESSER["avx2"] | {"QUANTIZE_ISA": "avx2"}
            lines = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            print("\neverything on AVX2", "\n".join(lines[:-1]), sep="\n", flush=True)
            figures["avx2_alone"] = json.loads(lines[-1])
        write("packed", figures)


if __name__ == "__main__":
    keep_pages()
    main()
