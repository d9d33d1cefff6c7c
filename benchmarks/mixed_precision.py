#!/usr/bin/env python3
"""Sensitivities of ResNets trained on mnist5k: what they cost, whether they predict, and whether the unconstrained optimum makes sense.

    python benchmarks/mixed_precision.py measure     # pairs take half an hour; interrupted ones go on
    python benchmarks/mixed_precision.py             # measures what runs/mixed_precision does not hold, then all tables and the plot

Weights of every layer at 2, 4 or 8 bits, and weights and inputs so: nine choices. All is measured, and true KL taken, on the same 128
training images, with one thread (raw loss pairs: 64 of them); accuracy is on the 1,000 test images.

- cost: processor time of each method, conversions for the bytes and all, on ResNet-20.
- prediction: KL of 250 random assignments per regime on ResNet-20, against what each method predicts (Spearman's rank correlation).
- passes: a forward pass's processor time an image, by the size of the batch. Choices of a layer could share one pass, a larger batch; that
  pays only where an image of a larger batch takes less.
- sanity: the optimum without a budget must be about as good as 8 bits everywhere. Raw pairs of loss changes, as in CLADO's code, beside it.
"""

import argparse
import copy
import json
import random
import statistics
import sys
import time
from pathlib import Path

import pandas
import paths  # noqa: F401
import torch
from data import load
from models import create_model
from results import FOLDER, write
from torch import nn
from trainings import run

import quantize

RUNS = Path("runs/mixed_precision")
FIRST = "--dataset mnist5k --batch-size 64 --lr 0.1 --epochs 6 --channels-last"
BITS = (2, 4, 8)
MADE_POSITIVE = "pairs, saturated and projected"
BOTH, WEIGHTS = "weights and inputs", "weights"
CHOICES = {BOTH: [(weight, activation) for weight in BITS for activation in BITS], WEIGHTS: [(weight, None) for weight in BITS]}
SAMPLES = 128
FEW = 64  # for the raw pairs, which are here to fail
REGIMES = ("4 bits and more", "10 to 20 % at 2 bits", "uniform")
# name: method, metric
METHODS = {
    "ZeroQ": ("diagonal", "kl"),
    "Gauss-Newton": ("gauss_newton", "kl"),
    "composed": ("composed", "kl"),
    "pairs": ("clado", "kl"),
    "loss pairs": ("clado", "loss"),
}
MEASURED = {
    ("resnet20", BOTH): tuple(METHODS),
    ("resnet20", WEIGHTS): ("ZeroQ", "Gauss-Newton", "composed", "pairs"),
    ("resnet56", BOTH): ("ZeroQ", "Gauss-Newton", "composed"),
}


def trained(arch: str, seed: int = 0) -> torch.nn.Module:
    """The float model, trained where it is not yet."""
    folder = run(f"--arch {arch} {FIRST} --seed {seed}", RUNS / f"{arch}-seed{seed}")
    model = create_model(arch, 10, 1)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    return model.eval()


def calibration(samples: int = SAMPLES) -> list:
    """One batch of training images, without augmentation."""
    images = load("mnist5k")[0]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:samples]
    return [images.batch(chosen, None)]


def file(arch: str, what: str, name: str) -> Path:
    """Where a sensitivity lies; beside it a file with the processor seconds that it took."""
    words = (arch, name) if what == BOTH else (arch, what, name)
    return RUNS / f"{'-'.join(words).replace(' ', '-').lower()}.safetensors"


def measured(arch: str, what: str, name: str) -> quantize.Sensitivity:
    """A sensitivity, from its file where there is one."""
    path = file(arch, what, name)
    seconds = path.with_suffix(".json")
    if path.exists():
        return quantize.Sensitivity.load(path)
    model = trained(arch)
    spent = json.loads(seconds.read_text()) if seconds.exists() else 0.0
    began = time.process_time()
    try:
        method, metric = METHODS[name]
        checkpoint = path.with_suffix(".checkpoint")
        images = calibration(FEW if name == "loss pairs" else SAMPLES)
        sensitivity = quantize.measure_sensitivity(model, images, CHOICES[what], method, metric, checkpoint=checkpoint)
        sensitivity.save(path)
    finally:
        seconds.write_text(json.dumps(spent + time.process_time() - began))
    print(f"{arch}, {what}, {name}: {spent + time.process_time() - began:.1f} s of processor time", flush=True)
    return sensitivity


def costs(what: str) -> dict[str, float]:
    """Processor seconds of each method on ResNet-20."""
    return {name: json.loads(file("resnet20", what, name).with_suffix(".json").read_text()) for name in MEASURED["resnet20", what]}


class Assigned:
    """A model at any assignment of choices to its layers: prepared once for each choice, its layers put together from those."""

    def __init__(self, arch: str, what: str):
        self.model, batches = trained(arch), calibration()
        self.inputs, self.at = batches[0][0], {}
        for weight, activation in CHOICES[what]:
            copied = quantize.prepare(copy.deepcopy(self.model), quantize.Uniform(weight, activation)).eval()
            self.at[weight, activation] = quantize.calibrate(copied, [self.inputs]) if activation else copied
        self.layers = [name for name, module in self.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        with torch.no_grad():
            self.reference = self.model(self.inputs).double().log_softmax(1)

    def __call__(self, choice: dict) -> nn.Module:
        """The model at `choice`."""
        mixed = copy.deepcopy(self.model)
        for name in self.layers:
            parent, _, child = name.rpartition(".")
            setattr(mixed.get_submodule(parent), child, self.at[choice[name]].get_submodule(name))
        return mixed

    @torch.no_grad()
    def kl(self, choice: dict) -> float:
        """True KL(float || quantized) on the calibration images."""
        found = self(choice)(self.inputs).double().log_softmax(1)
        return float((self.reference.exp() * (self.reference - found)).sum(1).mean())

    @torch.no_grad()
    def top1(self, choice: dict) -> float:
        """Percent of the test images."""
        model, images = self(choice), load("mnist5k")[1]
        right = 0
        for chosen in torch.arange(len(images)).split(250):
            inputs, targets = images.batch(chosen, None)
            right += int((model(inputs).argmax(1) == targets).sum())
        return 100 * right / len(images)


def draw(regime: str, what: str, layers: list[str], generator: random.Random) -> dict:
    """A random assignment."""
    fine = [choice for choice in CHOICES[what] if 2 not in choice]
    coarse = [choice for choice in CHOICES[what] if 2 in choice]
    if regime == "uniform":
        return {name: generator.choice(CHOICES[what]) for name in layers}
    share = 0 if regime == "4 bits and more" else generator.uniform(0.1, 0.2)
    return {name: generator.choice(coarse if generator.random() < share else fine) for name in layers}


def predictions(what: str, count: int) -> dict:
    """True and predicted KL of random assignments, by regime."""
    assigned, generator = Assigned("resnet20", what), random.Random(0)
    sensitivities = {name: measured("resnet20", what, name) for name in MEASURED["resnet20", what]}
    sensitivities[MADE_POSITIVE] = sensitivities["pairs"].saturated().projected()
    found = {}
    for regime in REGIMES:
        choices = [draw(regime, what, assigned.layers, generator) for _ in range(count)]
        true = []
        for number, choice in enumerate(choices):
            true.append(assigned.kl(choice))
            print(f"\r{what}, {regime}: {number + 1} of {count}", end="", file=sys.stderr)
        predicted = {name: [sensitivity.predict(choice) for choice in choices] for name, sensitivity in sensitivities.items()}
        table = pandas.DataFrame({"true": true, **predicted})
        spearman = table.corr("spearman")["true"].drop("true").to_dict()
        found[regime] = {"spearman": spearman, "points": {name: [float(f"{v:.6g}") for v in values] for name, values in table.items()}}
    return found


def plot(found: dict, path: Path) -> None:
    """Predicted against true KL."""
    from matplotlib import pyplot

    names = ("ZeroQ", "Gauss-Newton", "composed", "pairs", MADE_POSITIVE)
    figure, rows = pyplot.subplots(len(found), len(names), figsize=(3.2 * len(names), 3 * len(found)), squeeze=False)
    for axes, (regime, figures) in zip(rows, found.items(), strict=True):
        true = figures["points"]["true"]
        for axis, name in zip(axes, names, strict=True):
            axis.scatter(true, [max(value, 1e-6) for value in figures["points"][name]], s=6, alpha=0.5)
            ends = [min(true), max(true)]
            axis.plot(ends, ends, color="grey", linewidth=0.8)
            axis.set(xscale="log", yscale="log", title=f"{name}, {regime}\nSpearman {figures['spearman'][name]:.3f}")
    for axis in rows[-1]:
        axis.set_xlabel("true KL, nats")
    for axis in rows[:, 0]:
        axis.set_ylabel("predicted")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def passes(images: tuple[int, ...] = (32, 64, 128, 256, 384), rounds: int = 7) -> dict[int, float]:
    """Microseconds an image of a forward pass through ResNet-20, by images in a batch: medians, sizes taken in turns."""
    model, found = trained("resnet20"), {count: [] for count in images}
    with torch.no_grad():
        for _ in range(rounds):
            for count, seconds in found.items():
                inputs = torch.randn(count, 1, 32, 32)
                began = time.process_time()
                model(inputs)
                seconds.append(time.process_time() - began)
    return {count: statistics.median(seconds) / count * 1e6 for count, seconds in found.items()}


def sanity() -> list[dict]:
    """The optimum without a budget, against 8 bits everywhere."""
    rows = []
    for (arch, what), names in MEASURED.items():
        if what == WEIGHTS:
            continue
        assigned = Assigned(arch, what)
        best = dict.fromkeys(assigned.layers, (8, 8))
        for name in (*names, *([MADE_POSITIVE] if "pairs" in names else [])):
            sensitivity = measured(arch, what, "pairs" if name == MADE_POSITIVE else name)
            if name == MADE_POSITIVE:
                sensitivity = sensitivity.saturated().projected()
            allocation = quantize.allocate(sensitivity, time_limit=60)
            changed = sum(allocation.choice[layer] != (8, 8) for layer in assigned.layers)
            rows.append(
                {
                    "arch": arch,
                    "method": name,
                    "objective": allocation.objective,
                    "proven": allocation.proven,
                    "objective_8_bits": sensitivity.predict(best),
                    "layers_below_8_bits": changed,
                    "lowest_bits": min(min(pair) for pair in allocation.choice.values()),
                    "top1": assigned.top1(allocation.choice),
                    "top1_8_bits": assigned.top1(best),
                    "true_kl": assigned.kl(allocation.choice),
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("measure", "all"), default="all")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods to measure")
    parser.add_argument("--assignments", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for (arch, what), names in MEASURED.items():
        for name in names:
            if not args.only or name in args.only:
                measured(arch, what, name)
    if args.part == "measure":
        return
    found = {what: predictions(what, args.assignments) for what in CHOICES}
    for what, regimes in found.items():
        plot(regimes, FOLDER / f"mixed_precision_{what.replace(' ', '_')}.png")
        for regime, figures in regimes.items():
            print(f"{what}, {regime}:", "  ".join(f"{name} {value:.3f}" for name, value in figures["spearman"].items()))
    checked = sanity()
    print(pandas.DataFrame(checked).to_string())
    seconds = {what: costs(what) for what in CHOICES}
    for what, by_method in seconds.items():
        print(f"{what}:", "  ".join(f"{name} {value:.1f} s" for name, value in by_method.items()))
    by_size = passes()
    print("an image of a batch:", "  ".join(f"{count}: {time:.0f} us" for count, time in by_size.items()))
    figures = {"samples": SAMPLES, "seconds": seconds, "passes_us_an_image": by_size, "predictions": found, "sanity": checked}
    write("mixed_precision", figures)


if __name__ == "__main__":
    main()
