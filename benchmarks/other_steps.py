"""Step time of other people's models, unchanged: torchvision's and timm's at 2 bits, fixed and adaptive, beside the plain ones.

python benchmarks/other_steps.py [--batch 8] [--size 128] [--rounds 4] [--only resnet]     # needs torchvision and timm

fp32, contiguous, and autocast to bfloat16, channels last. Forward and backward without the optimizer, which is the same for all. A turn is
four steps, of which adaptive bits learn from one.
"""

import argparse
import copy

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from catalog import MODELS
from results import write
from settling import STEPS, settle
from timing import interleave, keep_pages, summarise

import quantize

NAMES = (
    *("torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/efficientnet_b0"),
    *("torchvision/densenet121", "torchvision/shufflenet_v2_x1_0", "torchvision/regnet_y_400mf", "timm/repvgg_a0"),
)
FORMATS = {"float32": torch.contiguous_format, "bfloat16": torch.channels_last}


def measure(entry, args, name: str) -> dict:
    """Times of the three sides of one model."""
    torch.manual_seed(0)
    layout = FORMATS[name]
    plain = entry.build(args.size).to(memory_format=layout)
    fixed = quantize.QModule(copy.deepcopy(plain), quantize.ActivationConfig(bits=2, max_bits=2))
    adaptive = quantize.QModule(copy.deepcopy(plain), quantize.ActivationConfig(bits=2))
    x = entry.inputs(args.batch, args.size).contiguous(memory_format=layout)

    def step(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", enabled=name == "bfloat16"):
            y = model(x)
            y = y if isinstance(y, torch.Tensor) else y[0]  # of models with auxiliary outputs
            loss = F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long))
        loss.backward()

    def turn(model):
        for _ in range(STEPS):
            step(model)

    settle(adaptive, lambda: step(adaptive))
    sides = {"plain": lambda: turn(plain), "2 bits": lambda: turn(fixed), "2 bits, adaptive": lambda: turn(adaptive)}
    found = summarise(interleave(sides, args.rounds), "plain")
    for side in found.values():
        side["median_s"], side["min_s"] = side["median_s"] / STEPS, side["min_s"] / STEPS
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", default="", help="models with this in their name; nothing is written")
    args = parser.parse_args()
    keep_pages()
    print(f"forward and backward, ms, batch {args.batch}, {args.size} pixels; times the plain one")
    results = {}
    for entry in MODELS:
        if entry.key not in NAMES or args.only not in entry.key:
            continue
        for name in FORMATS:
            sides = results.setdefault(entry.key, {})[name] = measure(entry, args, name)
            ratios = "  ".join(f"{side} {t['ratio']:.3f}" for side, t in sides.items() if side != "plain")
            print(f"{entry.key:36} {name:9} plain {1e3 * sides['plain']['median_s']:8.1f}  {ratios}", flush=True)
    if not args.only:
        write("other_steps", {"batch": args.batch, "size": args.size, "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
