"""Latency of whole binary networks at batch 1 on one thread, beside fp32 (oneDNN) and int8 of other libraries.

    python benchmarks/binary_models.py [--rounds 41] [--threads 1]

Binary: the examples' ResNets in pre-activation order, all but the first and the last layer in 1 bit, through quantize.prepare and convert.
fp32 and int8 run the ordinary ResNet of the same layers, batch norms folded for int8, each in the memory format that suits it best. Weights
are random: latency does not depend on them. Sides take turns. PyTorch's run as modules, and without Python by quantize.capture, as the
other libraries do; the best of each counts.

Then the same on lesser ISAs, each in a process of its own whose libraries keep to it (ONEDNN_MAX_CPU_ISA, which OpenVINO heeds too,
MKL_ENABLE_INSTRUCTIONS, ATEN_CPU_CAPABILITY, QUANTIZE_ISA): what machines without AMX, and without AVX-512, have. onnxruntime cannot be
kept from what the machine has, and is left out there.
"""

import argparse
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import paths  # noqa: F401
import torch
from int8_peers import runtimes
from models import create_model
from results import write
from timing import interleave, keep_pages, summarise
from torch import nn

import quantize
from quantize import _C

LESSER = {  # our ISA: the libraries'
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
MODELS = {"resnet20": (10, 32, 5), "resnet18": (1000, 224, 1)}  # classes, image size, calls a turn


def binary(arch: str, classes: int) -> nn.Module:
    """The packed network."""
    model = create_model(f"{arch}_q", classes).eval()
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return quantize.convert(quantize.prepare(model, {"*": quantize.XNOR(), layers[0]: None, layers[-1]: None}))


def onnx_int8(model: nn.Module, x: torch.Tensor) -> bytes:
    """`model` in 8 bits, quantized by onnxruntime's tool as it recommends: weights by channel, QuantizeLinear and DequantizeLinear."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": torch.randn_like(x).numpy()} for _ in range(4)]

        def get_next(self):
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = io.BytesIO()
        torch.onnx.export(model, (x,), stream, input_names=["x"], output_names=["y"], dynamo=False)
        plain, ready, done = (str(Path(folder, name)) for name in ("plain.onnx", "ready.onnx", "done.onnx"))
        onnx.save(onnx.load_from_string(stream.getvalue()), plain)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)  # it fails on windows of attention; sizes are fixed anyway
        quantize_static(ready, done, Batches(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return Path(done).read_bytes()


def measure(arch: str, args) -> dict:
    """One architecture, all sides."""
    classes, size, calls = MODELS[arch]
    x = torch.randn(1, 3, size, size)
    plain, ours = create_model(arch, classes).eval(), binary(arch, classes)
    sides = {}
    for suffix, form in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
        own = x.to(memory_format=form)
        for name, model in (("fp32", plain), ("binary", ours)):
            moved = copy.deepcopy(model).to(memory_format=form)
            sides[name + suffix] = lambda moved=moved, own=own: moved(own)
            fast = quantize.capture(moved)
            sides[f"{name}{suffix}, captured"] = lambda fast=fast, own=own: fast(own)
    others = ["OpenVINO int8"] if args.reference else ["onnxruntime int8", "OpenVINO int8"]  # the former cannot be kept to an ISA
    sides |= runtimes(onnx_int8, plain, x, args.threads, others)
    with torch.inference_mode():
        turns = {label: lambda run=run: [run() for _ in range(calls)] for label, run in sides.items()}
        taken = interleave(turns, args.rounds, warmup=3)
    times = summarise({label: [t / calls for t in values] for label, values in taken.items()}, "fp32")
    layers = quantize.summary(ours, x)
    print(f"\n{arch}, {_C.cpu_isa()}: {layers.macs / 1e6:.1f} M multiply-adds, ", end="")
    print(f"{layers.bytes / 1024:.0f} KiB packed of {layers.float_bytes / 1024:.0f}")
    result = {}
    for label, t in times.items():
        print(f"  {label:32} {t['median_s'] * 1e3:8.3f} ms {1 / t['ratio']:6.2f} x fp32", flush=True)
        result[label] = {"median_s": t["median_s"], "min_s": t["min_s"], "speedup": 1 / t["ratio"]}
    best = {
        kind: min(t["median_s"] for label, t in times.items() if kind in label)
        for kind in ("fp32", "binary", "int8")
        if any(kind in n for n in times)
    }
    print("  best of each: " + ", ".join(f"{kind} {t * 1e3:.3f} ms" for kind, t in best.items()))
    ratios = {f"over {kind}": t / best["binary"] for kind, t in best.items() if kind != "binary"}
    return {"model": arch, "macs": layers.macs, "bytes": layers.bytes, "float_bytes": layers.float_bytes, "sides": result, **ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", action="store_true", help="only this process's ISA, as JSON on the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [measure(arch, args) for arch in MODELS]
    if args.reference:
        print(json.dumps(results))
        return
    figures = {"threads": args.threads, "rounds": args.rounds, "isa": _C.cpu_isa(), "results": results}
    command = [sys.executable, __file__, "--reference", "--rounds", str(args.rounds), "--threads", str(args.threads)]
    for isa in [isa for isa in LESSER if isa in _C.supported_isas()[:-1]]:
        env = os.environ | LESSER[isa] | {"QUANTIZE_ISA": isa}
        lines = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print("\n".join(lines[:-1]), flush=True)
        figures[f"{isa}_alone"] = json.loads(lines[-1])
    write("binary_models", figures)


if __name__ == "__main__":
    keep_pages()
    main()
