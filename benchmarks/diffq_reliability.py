#!/usr/bin/env python3
"""Does DiffQ survive what killed trainings of facebookresearch/diffq? Eleven models, group sizes 4, 8 and 16, penalty 5, on mnist5k.

    python benchmarks/diffq_reliability.py                          # all 33 runs, guarded and not; about 20 minutes
    python benchmarks/diffq_reliability.py --archs lenet --groups 8

The deadly recipe: a gradient scaler for two optimizers (SGD for the weights, Adam for the bits), both unscaled, then the norm of all
gradients clipped, then both stepped. There is no fp16 on this device, so its overflow is planted where these had it, in the layers
that are not quantized: a gradient of a batch norm or a bias that is beyond 65,504 while scaled becomes inf - inf, as a sum of fp16 numbers
on both sides does. The scale doubles every ten good steps, so that it overflows again and again. And the first layer's channels are made a
hundred times smaller, which makes gradients large. In the unguarded variant an ordinary Adam holds the logits.
"""

import argparse
import math
import time

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from data import load
from models import create_model
from results import write

import quantize

# Narrow forms, so that 66 trainings fit an hour of two cores; the width is of the first stage.
ARCHS = {
    "lenet": 6,
    "mobilenet": 16,
    "mobilenetv2": 16,
    "densenet": 12,
    "dla": 8,
    "dla_simple": 8,
    "efficientnet_b0": 16,
    "resnet18_cifar": 16,
    "resnet20": 16,
    "senet": 16,
    "wide_resnet16_4": 16,
}
GROUPS, PENALTY, BATCH, LARGEST_HALF = (4, 8, 16), 5, 32, 65504.0


def overflow(grad: torch.Tensor) -> torch.Tensor:
    """What an fp16 sum makes of a gradient beyond its largest number."""
    return torch.where(grad.abs() > LARGEST_HALF, math.nan, grad)


def train(arch: str, group_size: int, guarded: bool, steps: int, parts) -> dict:
    """One run. It ends early where a weight, a logit or the loss is not finite any more."""
    began = time.perf_counter()
    torch.manual_seed(0)
    model = create_model(arch, 10, 1, ARCHS[arch])
    with torch.no_grad():
        model.conv1.weight.mul_(0.01)
    model = quantize.prepare(model, quantize.DiffQ(group_size))
    logits = [p for name, p in model.named_parameters() if name.endswith(".logits")]
    quantized = {id(p) for name, p in model.named_parameters() if name.endswith(".original")} | {id(p) for p in logits}
    weights = [p for p in model.parameters() if id(p) not in {id(q) for q in logits}]
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.register_hook(overflow)
    main = torch.optim.SGD(weights, 0.02, momentum=0.9, weight_decay=5e-4)
    if guarded:
        bits = torch.optim.Adam([{"params": []}])
        guard = quantize.add_bit_parameters(bits, model, lr=1e-2)
    else:
        bits, guard = torch.optim.Adam(logits, lr=1e-2), None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10)
    result = {"arch": arch, "group_size": group_size, "guarded": guarded, "steps": 0, "overflows": 0, "died": None}
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(steps):
        images, targets = parts[0].batch(torch.randint(len(parts[0]), (BATCH,), generator=generator), step)
        loss = F.cross_entropy(model(images), targets) + PENALTY * quantize.size_penalty(model)
        result["steps"], value = step + 1, float(loss.detach())
        main.zero_grad(), bits.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(main), scaler.unscale_(bits)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        result["overflows"] += not bool(norm.isfinite())
        scaler.step(main), scaler.step(bits)
        scaler.update()
        culprit = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
        if culprit or not math.isfinite(value):
            result["died"] = culprit or "loss"
            break
    model.eval()
    found = torch.cat(list(quantize.weight_bits(model).values()))
    with torch.no_grad():
        images, targets = parts[1].batch(torch.arange(500))
        result["top1"] = 100 * float((model(images).argmax(1) == targets).float().mean())
    result |= {"skipped": guard.skipped if guard else None, "mean_bits": float(found.mean()), "seconds": time.perf_counter() - began}
    if result["died"] is None:
        result["bits_finite"] = bool(found.isfinite().all())
        result["file_bytes"] = quantize.size_report(model).bytes
        result["penalty_bytes"] = float(quantize.size_penalty(model)) * 2**20
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    parts, runs = load("mnist5k"), []
    for arch in args.archs:
        for group_size in args.groups:
            for guarded in (True, False):
                run = train(arch, group_size, guarded, args.steps, parts)
                runs.append(run)
                end = f"died at step {run['steps']} ({run['died']})" if run["died"] else f"finished, {run['top1']:.1f} %"
                name = "guarded" if guarded else "not guarded"
                print(
                    f"{arch:16} group {group_size:2}, {name:11}: {end}; {run['overflows']} overflows, {run['skipped']} steps of the bits "
                    f"skipped, {run['mean_bits']:.2f} bits, {run['seconds']:.0f} s",
                    flush=True,
                )
    lived = {guarded: sum(r["died"] is None for r in runs if r["guarded"] is guarded) for guarded in (True, False)}
    print(f"{lived[True]} of {len(runs) // 2} guarded runs finished, {lived[False]} of {len(runs) // 2} without the guard")
    whole = args.archs == list(ARCHS) and tuple(args.groups) == GROUPS
    if whole:
        write("diffq_reliability", {"penalty": PENALTY, "batch": BATCH, "steps": args.steps, "widths": ARCHS, "lived": lived, "runs": runs})


if __name__ == "__main__":
    main()
