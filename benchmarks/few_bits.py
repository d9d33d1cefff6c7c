"""Latency of convolutions of few bits beside our own 8-bit ones: 3x3, batch 1, one thread, on every ISA of the machine.

python benchmarks/few_bits.py [--rounds 41]

Ternary weights with 8-bit inputs; DoReFa with weights and inputs of 1 and 2 bits, of 2 and 1, and of 2 and 2.
"""

import argparse
import copy

import torch
from binary import CONVS, calls_of, name_of, turn
from results import write
from timing import interleave, keep_pages, summarise
from torch import nn

import quantize
from quantize import _C

REFERENCE = "8 bits"
CONFIGS = {
    REFERENCE: quantize.Uniform(8, activation_bits=8),
    "ternary": quantize.Ternary(activation_bits=8),
    "1x2 bits": quantize.DoReFa(1, 2),
    "2x1 bits": quantize.DoReFa(2, 1),
    "2x2 bits": quantize.DoReFa(2, 2),
}


def packed(layer: nn.Module, config, x: torch.Tensor) -> nn.Module:
    model = quantize.prepare(nn.Sequential(copy.deepcopy(layer)), config)
    fixed = isinstance(config, quantize.DoReFa)  # its inputs' levels need no data
    return quantize.convert(model if fixed else quantize.calibrate(model, [x]))


def measure(channels: int, size: int, rounds: int) -> dict:
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, size, size)
    calls = calls_of("conv", channels, size)
    isas = [isa for isa in _C.supported_isas() if isa != "portable"] or ["portable"]
    sides = {}
    for name, config in CONFIGS.items():
        made = packed(layer, config, x)
        for isa in isas:  # of its own: at the first call it chooses its kernel
            own = copy.deepcopy(made)
            sides[f"{name}, {isa}"] = turn(lambda own=own: own(x), calls, isa)
    with torch.inference_mode():
        taken = interleave(sides, rounds, warmup=3)
    label, found = name_of("conv", channels, size), {}
    for isa in isas:
        own = {name: [t / calls for t in taken[f"{name}, {isa}"]] for name in CONFIGS}
        times = summarise(own, REFERENCE)
        found[isa] = {name: {"median_s": t["median_s"], "speedup": 1 / t["ratio"]} for name, t in times.items()}
        print(f"{label:20} {isa:8}" + "; ".join(f"{n} {1e6 * t['median_s']:.0f} us ({t['speedup']:.2f}x)" for n, t in found[isa].items()))
    return {"layer": label, "isas": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write("few_bits", {"rounds": args.rounds, "results": [measure(*case, args.rounds) for case in CONVS]})


if __name__ == "__main__":
    keep_pages()
    main()
