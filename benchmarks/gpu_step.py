"""Step time and peak memory of ResNet-50 training on a GPU, plain and compressed.

python benchmarks/gpu_step.py [--batch 64] [--rounds 12] [--output FILE]
"""

import argparse
import contextlib
import copy
from pathlib import Path

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from models import create_model
from results import write
from settling import STEPS, settle
from timing import interleave, summarise

import quantize

C = quantize.ActivationConfig
CONFIGS = {"plain": None, "2 bits": C(2, 2), "2 bits, adaptive": C(2)}


def measure(batch: int, rounds: int, amp: bool) -> dict:
    """Times of every side, in turn, and each one's peak memory over the start of a step."""
    torch.manual_seed(0)
    plain = create_model("resnet50", num_classes=1000, in_channels=3).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device="cuda")
    models = {name: copy.deepcopy(plain) if c is None else quantize.QModule(copy.deepcopy(plain), c) for name, c in CONFIGS.items()}

    def step(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16) if amp else contextlib.nullcontext():
            loss = F.cross_entropy(model(x), target)
        loss.backward()

    settle(models["2 bits, adaptive"], lambda: step(models["2 bits, adaptive"]))
    turns = {name: lambda model=model: [step(model) for _ in range(STEPS)] for name, model in models.items()}
    taken = interleave(turns, rounds, warmup=1)
    result = summarise({name: [t / STEPS for t in times] for name, times in taken.items()}, "plain")
    for name, model in models.items():
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model)
        result[name]["peak_mib_per_image"] = (torch.cuda.max_memory_allocated() - before) / batch / 2**20
        model.zero_grad(set_to_none=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, help="instead of results/gpu_step.json")
    args = parser.parse_args()
    results = {}
    for name, amp in (("fp32", False), ("bf16 autocast", True)):
        results[name] = measure(args.batch, args.rounds, amp)
        for side, r in results[name].items():
            print(
                f"{name:14} {side:18} {r['median_s'] * 1e3:8.1f} ms {r['ratio']:6.3f} x plain   {r['peak_mib_per_image']:7.1f} MiB an image"
            )
    write("gpu_step", {"model": "resnet50", "batch": args.batch, "rounds": args.rounds, "results": results}, args.output)


if __name__ == "__main__":
    main()
