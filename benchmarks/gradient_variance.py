"""Variance that compression adds to the gradient of preact ResNet-56, in the configurations of ActNN's CIFAR table.

    python benchmarks/gradient_variance.py [--epochs 6] [--memory-format contiguous] [--batches 3] [--draws 10] [--only "2/2 group" ...]

Trains on mnist5k in full precision first (the checkpoint stays in runs/), then measures at fixed weights, in train mode, batches of 128:
Quant Var, and how each configuration compares with the one before it. "range bound" is the last configuration with ActNN's sensitivity
(the squared range of each group over 6 (2^b - 1)^2 an element) in place of the exact variance. "by stage": what groups of 256 gain over a
range a sample, by the layers whose gradient it is: a group is a quarter of a channel at 32x32, and four channels at 8x8.
"""

import argparse
import contextlib
import copy
from collections import Counter

import paths
import torch
import torch.nn.functional as F
from data import Loader, load
from models import create_model
from results import merged, write

import quantize
from quantize.activation import state as activation_state

C = quantize.ActivationConfig
# Name in ActNN's table (bits / most bits, per group, per layer, gradient) to configuration.
CONFIGURATIONS = {
    "4/4": C(4, 4, group_size="sample"),
    "2/2": C(2, 2, group_size="sample"),
    "2/2 group": C(2, 2),
    "2/8 group": C(2, 8, per_layer=False),
    "2/8 group gradient": C(2, 8, per_layer=False, use_gradient=True),
    "2/8 group layer": C(2, 8),
    "2/8 group layer gradient": C(2, 8, use_gradient=True),
}
# CIFAR-10's figures there, for orientation: another data set and another training.
ACTNN = {
    "4/4": 0.01183,
    "2/2": 0.2969,
    "2/2 group": 0.03139,
    "2/8 group": 0.03348,
    "2/8 group gradient": 0.00614,
    "2/8 group layer": 0.01981,
    "2/8 group layer gradient": 0.00262,
}


def range_bound(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """ActNN's sensitivity: the variance of a group if p(1 - p) were 1/6 throughout, float32 [N, 4]."""
    flat = x.reshape(x.shape[0], -1)
    size = group_size or flat.shape[1]
    flat = F.pad(flat, (0, -flat.shape[1] % size), mode="replicate") if flat.shape[1] % size else flat
    groups = flat.view(x.shape[0], -1, size)
    squares = (groups.amax(2) - groups.amin(2)).square().sum(1) * size / 6
    return torch.stack([squares / (2**bits - 1) ** 2 for bits in (1, 2, 4, 8)], dim=1)


@contextlib.contextmanager
def bounded_sensitivity():
    """Within it, bits are allocated by the range bound."""

    class Ops:
        group_variance = staticmethod(range_bound)

        @staticmethod
        def norm_variance(x: torch.Tensor, mean: torch.Tensor, inverse_std: torch.Tensor, group_size: int) -> torch.Tensor:
            along = (1, -1, *[1] * (x.dim() - 2))
            return range_bound((x - mean.view(along)) * inverse_std.view(along), group_size)

        def __getattr__(self, name):
            return getattr(torch.ops.quantize, name)

    before, activation_state.ops_for = activation_state.ops_for, lambda *tensors: Ops()
    try:
        yield
    finally:
        activation_state.ops_for = before


def trained(arch: str, epochs: int) -> torch.nn.Module:
    """The model after `epochs` of mnist5k in full precision, from runs/ if it has been trained before."""
    torch.manual_seed(0)
    train, test = load("mnist5k")
    model = create_model(arch, num_classes=train.classes, in_channels=train.channels).to(memory_format=torch.channels_last)
    path = paths.ROOT / "runs" / f"gradient_variance_{arch}_{epochs}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    loader = Loader(train, 128, train=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    for epoch in range(epochs):
        for images, target, _ in loader.epoch(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), target)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.4f}", flush=True)
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def stage_of(parameter: str) -> str:
    return next((part for part in parameter.split(".") if part.startswith("layer")), "others")


def by_stage(model: torch.nn.Module, batch: tuple, draws: int) -> dict[str, float]:
    """Variance of the gradients of each stage over the compression's draws."""
    sums, squares = {}, Counter()
    for _ in range(draws):
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        for name, p in model.named_parameters():
            grad = p.grad.double()
            sums[name] = grad + sums[name] if name in sums else grad
            squares[stage_of(name)] += float(grad.square().sum())
    for name, total in sums.items():
        squares[stage_of(name)] -= float(total.square().sum()) / draws
    return {stage: value / (draws - 1) for stage, value in squares.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="preact_resnet56")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--memory-format", choices=["channels_last", "contiguous"], default="contiguous", help="ActNN's: contiguous")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--only", nargs="+", help="measure these configurations again and keep the other figures")
    args = parser.parse_args()
    form = torch.channels_last if args.memory_format == "channels_last" else torch.contiguous_format
    model = trained(args.arch, args.epochs).to(memory_format=form).train()
    train, _ = load("mnist5k")
    batches = []
    for images, target, _ in Loader(train, 128, train=True, seed=1).epoch(0):
        batches.append((images.contiguous(memory_format=form), target))
        if len(batches) == args.batches:
            break
    results = {}
    print(f"{args.arch}, mnist5k, {args.batches} batches of 128, {args.draws} draws each")
    print(f"{'':38} {'Quant Var':>10} {'Sample Var':>11} {'before/this':>12} {'ActNN, CIFAR-10':>16}")
    previous = None
    for name in [*CONFIGURATIONS, "2/8 group layer, range bound", "2/8 group layer gradient, range bound"]:
        if args.only and name not in args.only:
            continue
        config = CONFIGURATIONS[name.removesuffix(", range bound")]
        with bounded_sensitivity() if name.endswith("bound") else contextlib.nullcontext():
            converted = quantize.QModule(copy.deepcopy(model), config)
            report = quantize.variance_report(converted, batches, F.cross_entropy, args.draws)
        gain = previous / report.quantization if previous else float("nan")
        previous = report.quantization
        results[name] = {"quant_var": report.quantization, "sample_var": report.sample, "overall_var": report.overall}
        reference = f"{ACTNN[name]:.5f}" if name in ACTNN else ""
        print(f"{name:38} {report.quantization:10.5f} {report.sample:11.5f} {gain:12.2f} {reference:>16}", flush=True)
    per_sample, per_group = (
        by_stage(quantize.QModule(copy.deepcopy(model), CONFIGURATIONS[name]), batches[0], args.draws) for name in ("2/2", "2/2 group")
    )
    gains = {stage: per_sample[stage] / per_group[stage] for stage in sorted(per_sample)}
    print("groups of 256 over a range a sample, by stage: " + ", ".join(f"{stage} {gain:.1f}" for stage, gain in gains.items()))
    settings = {"arch": args.arch, "epochs": args.epochs, "memory_format": args.memory_format, "batches": args.batches, "draws": args.draws}
    results = merged("gradient_variance", "results", results, **settings) if args.only else results
    write("gradient_variance", {**settings, "results": results, "group_gain_by_stage": gains, "actnn_cifar10": ACTNN})


if __name__ == "__main__":
    main()
