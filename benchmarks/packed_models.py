"""Latency of whole networks in packed weights and 8-bit activations at batch 1 on one thread, beside fp32 (oneDNN) and other
libraries' int8.

    python benchmarks/packed_models.py [--rounds 21] [--threads 1]

Every convolution and linear layer is packed, the first and the last too, batch norms folded, through quantize.prepare, calibrate and
convert. fp32 runs the network as it is trained, and with its batch norms folded by torch.fx where that can trace it; each in the memory
format that suits it best. int8 is onnxruntime's static quantization of the same network, run by onnxruntime and by OpenVINO. Weights are
random: latency does not depend on them. Sides take turns. PyTorch's run as modules, and without Python by quantize.capture, as the other
libraries do; the best of each counts.

Then the same where everything keeps to AVX2 (binary_models.py says how).
"""

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys

import paths  # noqa: F401
import torch
from binary_models import LESSER, onnx_int8
from int8_peers import runtimes
from models import create_model
from results import write
from timing import interleave, keep_pages, summarise
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

import quantize
from quantize import _C

MODELS = {  # classes, image size, calls a turn
    "resnet20": (10, 32, 5),
    "mobilenet": (10, 32, 5),
    "resnet18": (1000, 224, 1),
    "mobilenet, 224x224": (1000, 224, 1),
    "mobilevit_xxs": (1000, 256, 1),
}
CONFIGURATIONS = {
    "8 bits": quantize.Uniform(8, activation_bits=8),
    "4 bits": quantize.Uniform(4, activation_bits=8),
    "PO2+ 4 bits": quantize.PowerOfTwo(4, activation_bits=8),
}
FORMATS = {"": torch.contiguous_format, ", channels last": torch.channels_last}


def packed(model: nn.Module, x: torch.Tensor, config) -> nn.Module:
    """A packed copy of `model`, calibrated on `x`."""
    prepared = quantize.prepare(copy.deepcopy(model), config)
    quantize.calibrate(prepared, [x], "minmax")
    return quantize.convert(prepared).eval()


def measure(name: str, args) -> dict:
    """One network, all sides."""
    classes, size, calls = MODELS[name]
    x = torch.randn(1, 3, size, size)
    plain = create_model(name.split(",")[0], classes).eval()
    models = {"fp32": plain}
    with contextlib.suppress(TraceError):
        models["fp32, folded"] = fuse(plain).eval()
    models |= {label: packed(plain, x, config) for label, config in CONFIGURATIONS.items()}
    sides = {}
    for suffix, form in FORMATS.items():
        own = x.to(memory_format=form)
        for label, model in models.items():
            moved = copy.deepcopy(model).to(memory_format=form)
            sides[label + suffix] = lambda moved=moved, own=own: moved(own)
            fast = quantize.capture(moved)
            sides[f"{label}{suffix}, captured"] = lambda fast=fast, own=own: fast(own)
    others = ["OpenVINO int8"] if args.reference else ["onnxruntime int8", "OpenVINO int8"]  # the former cannot be kept to an ISA
    sides |= runtimes(onnx_int8, plain, x, args.threads, others)
    with torch.inference_mode():
        turns = {label: lambda run=run: [run() for _ in range(calls)] for label, run in sides.items()}
        taken = interleave(turns, args.rounds, warmup=3)
    times = summarise({label: [t / calls for t in values] for label, values in taken.items()}, "fp32")
    report = quantize.summary(models["8 bits"], x)
    print(f"\n{name}: {report.macs / 1e6:.0f} M multiply-adds", flush=True)
    for label, t in times.items():
        print(f"  {label:36} {t['median_s'] * 1e3:8.3f} ms {1 / t['ratio']:6.2f} x fp32", flush=True)
    best = {
        kind: min(t["median_s"] for label, t in times.items() if label.startswith(kind) or (kind == "int8" and kind in label))
        for kind in ("fp32", *CONFIGURATIONS, "int8")
        if any(label.startswith(kind) or (kind == "int8" and kind in label) for label in times)
    }
    return {"model": name, "macs": report.macs, "float_bytes": report.float_bytes, "sides": times, "best_s": best}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", action="store_true", help="only this process's ISA, as JSON on the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [measure(name, args) for name in MODELS]
    if args.reference:
        print(json.dumps(results))
        return
    figures = {"threads": args.threads, "rounds": args.rounds, "isa": _C.cpu_isa(), "results": results}
    if "avx2" in _C.supported_isas()[:-1]:
        command = [sys.executable, __file__, "--reference", "--rounds", str(args.rounds), "--threads", str(args.threads)]
        env = os.environ | LESSER["avx2"] | {"QUANTIZE_ISA": "avx2"}
        lines = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print("\neverything on AVX2", "\n".join(lines[:-1]), sep="\n", flush=True)
        figures["avx2_alone"] = json.loads(lines[-1])
    write("packed_models", figures)


if __name__ == "__main__":
    keep_pages()
    main()
