"""Latency of ternary convolutions beside our own 8-bit ones: 3x3, 8-bit inputs, batch 1, one thread, on every ISA of the machine.

python benchmarks/ternary.py [--rounds 41]
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

CONFIGS = {"ternary": quantize.Ternary(activation_bits=8), "8 bits": quantize.Uniform(8, activation_bits=8)}


def packed(layer: nn.Module, config, x: torch.Tensor) -> nn.Module:
    model = quantize.prepare(nn.Sequential(copy.deepcopy(layer)), config)
    return quantize.convert(quantize.calibrate(model, [x]))


def measure(channels: int, size: int, rounds: int) -> dict:
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, size, size)
    calls = calls_of("conv", channels, size)
    models = {name: packed(layer, config, x) for name, config in CONFIGS.items()}
    isas = [isa for isa in _C.supported_isas() if isa != "portable"] or ["portable"]
    sides = {f"{name}, {isa}": turn(lambda model=model: model(x), calls, isa) for isa in isas for name, model in models.items()}
    with torch.inference_mode():
        taken = interleave(sides, rounds, warmup=3)
    found = {}
    for isa in isas:
        own = {side: [t / calls for t in taken[side]] for side in (f"8 bits, {isa}", f"ternary, {isa}")}
        times = summarise(own, f"8 bits, {isa}")
        found[isa] = {name: times[f"{name}, {isa}"]["median_s"] for name in CONFIGS}
        found[isa]["speedup"] = 1 / times[f"ternary, {isa}"]["ratio"]
    own = "; ".join(f"{isa} {1e6 * t['ternary']:.0f} us, {t['speedup']:.2f} times our 8 bits" for isa, t in found.items())
    print(f"{name_of('conv', channels, size):28} {own}", flush=True)
    return {"layer": name_of("conv", channels, size), "isas": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write("ternary", {"rounds": args.rounds, "results": [measure(*case, args.rounds) for case in CONVS]})


if __name__ == "__main__":
    keep_pages()
    main()
