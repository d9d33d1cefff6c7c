"""What each compressed layer costs: forward and backward beside the plain layer, and what it keeps for backward. One thread; fp32, and
bfloat16 in channels last. A turn is four steps, of which adaptive bits learn from one.

python benchmarks/layers.py [--rounds 21]
"""

import argparse

import paths  # noqa: F401
import torch
from results import write
from settling import STEPS, settle
from timing import interleave, keep_pages, summarise
from torch import nn

import quantize

IMAGES, SMALL, ROWS = (8, 64, 56, 56), (8, 64, 28, 28), (512, 512)
LAYERS = {  # name: layer, input
    "conv 3x3": (lambda: nn.Conv2d(64, 64, 3, padding=1), IMAGES),
    "conv 1x1": (lambda: nn.Conv2d(64, 64, 1), IMAGES),
    "conv 3x3 depthwise": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), IMAGES),
    "transposed conv 2x2": (lambda: nn.ConvTranspose2d(64, 64, 2, 2), SMALL),
    "linear": (lambda: nn.Linear(512, 512), ROWS),
    "batch norm": (lambda: nn.BatchNorm2d(64), IMAGES),
    "batch norm of rows": (lambda: nn.BatchNorm1d(512), ROWS),
    "ReLU": (nn.ReLU, IMAGES),
    "leaky ReLU": (lambda: nn.LeakyReLU(0.1), IMAGES),
    "hardtanh": (nn.Hardtanh, IMAGES),
    "SiLU": (nn.SiLU, IMAGES),
    "GELU": (nn.GELU, IMAGES),
    "dropout": (lambda: nn.Dropout(0.3), IMAGES),
    "max pool 2x2": (lambda: nn.MaxPool2d(2), IMAGES),
    "max pool 3x3, stride 2": (lambda: nn.MaxPool2d(3, 2, 1), IMAGES),
    "average pool 2x2": (lambda: nn.AvgPool2d(2), IMAGES),
    "upsampling by 2": (lambda: nn.Upsample(scale_factor=2), SMALL),
}
FORMATS = {
    "contiguous": (torch.contiguous_format, torch.float32),
    "channels_last": (torch.channels_last, torch.float32),
    "bfloat16": (torch.channels_last, torch.bfloat16),
}


def measure(make, shape: tuple, layout: torch.memory_format, dtype: torch.dtype, rounds: int) -> dict:
    """Times of the plain layer, at exactly 2 bits, and at 2 bits that adapt; and how many times less is saved."""
    configs = {
        "plain": None,
        "2 bits": quantize.ActivationConfig(bits=2, max_bits=2),
        "2 bits, adaptive": quantize.ActivationConfig(bits=2),
    }
    models = {
        name: quantize.QModule(nn.Sequential(make()), config) if config else nn.Sequential(make()) for name, config in configs.items()
    }
    models = {name: model.to(dtype) for name, model in models.items()}
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(models["plain"](x))
    adaptive = models["2 bits, adaptive"]
    settle(adaptive, lambda: adaptive(x).backward(grad))
    turns = {name: lambda model=model: [model(x).backward(grad) for _ in range(STEPS)] for name, model in models.items()}
    times = {name: [t / STEPS for t in taken] for name, taken in interleave(turns, rounds, warmup=2).items()}
    report = quantize.memory_report(models["2 bits"], x)
    return {"sides": summarise(times, "plain"), "saved_bytes": report.saved_bytes, "plain_bytes": report.baseline_bytes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    keep_pages()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    for layout, (form, dtype) in FORMATS.items():
        print(f"\n{layout}: times the plain layer's; KiB saved")
        results[layout] = {}
        for name, (make, shape) in LAYERS.items():
            if layout != "contiguous" and len(shape) != 4:
                continue
            result = results[layout][name] = measure(make, shape, form, dtype, args.rounds)
            ratios = ", ".join(f"{side} {t['ratio']:5.2f}" for side, t in result["sides"].items() if side != "plain")
            print(f"  {name:24} {ratios}; {result['saved_bytes'] / 1024:7.0f} of {result['plain_bytes'] / 1024:.0f}", flush=True)
    write("layers", {"results": results})


if __name__ == "__main__":
    main()
