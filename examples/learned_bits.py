"""Learned bits (`--weights diffq`): their flags, what they add to the loss, and the optimizer that moves them."""

import argparse
import math
from dataclasses import dataclass

import quantize
import torch
from torch import Tensor, nn

from said import blaming

DEFAULTS = {"group_size": 8, "min_bits": 2.0, "max_bits": 15.0, "init_bits": 8.0, "bits_lr": 0.03, "bits_optimizer": "adam"}
PENALTY, TARGET_PENALTY = 5.0, 10.0  # of a MiB, as in the paper; of a target, with which the size ends there


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of learned bits."""
    add = parser.add_argument_group("learned bits, of --weights diffq").add_argument
    add("--group-size", type=int, metavar="G", help="weights in a row that share their bits, 0: a whole layer's; 8 if not given")
    add("--penalty", type=float, metavar="P", help="loss per MiB of the file less its header; 5 if not given, with --target-size 10")
    add("--target-size", type=float, metavar="MIB", help="penalize the distance to this size instead of the size")
    add("--min-bits", type=float, metavar="B", help="fewest bits of a weight; 2 if not given")
    add("--max-bits", type=float, metavar="B", help="most bits of a weight; 15 if not given")
    add("--init-bits", type=float, metavar="B", help="bits that all groups start with; 8 if not given")
    add(
        "--bits-lr",
        type=float,
        help="peak learning rate of the bits, on --lr's schedule; 0.03 if not given, for some 300 steps; 0.001 for 10,000 or more",
    )
    text = "an Adam of their own, or a group of the SGD, which needs a --bits-lr of a thousand or so; adam if not given"
    add("--bits-optimizer", choices=("adam", "same"), help=text)


def check(args: argparse.Namespace, error) -> None:
    """Fill in the defaults; `error(text)` for flags that do not go together."""
    if args.weights != "diffq":
        for name in (*DEFAULTS, "penalty", "target_size"):
            if getattr(args, name) is not None:
                error(f"--{name.replace('_', '-')} belongs to --weights diffq")
        return
    for name, value in DEFAULTS.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.penalty = args.penalty if args.penalty is not None else _usual_penalty(args)
    for name in ("group_size", "penalty", "bits_lr"):
        if not getattr(args, name) >= 0:
            error(f"--{name.replace('_', '-')} must not be negative; got {getattr(args, name)}")
    if args.target_size is not None and not args.target_size > 0:
        error(f"--target-size must be above 0; got {args.target_size}")
    for name in ("penalty", "bits_lr", "target_size"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            error(f"--{name.replace('_', '-')} must be finite; got {getattr(args, name)}")
    low, first, high = args.min_bits, args.init_bits, args.max_bits
    if not 1 <= low <= first <= high <= 16:
        error(f"--min-bits, --init-bits and --max-bits must be from 1 to 16 and in this order; got {low:g}, {first:g} and {high:g}")
    if math.ceil(low) > math.floor(high):
        error(f"--min-bits to --max-bits must hold a whole number; got {low:g} to {high:g}")


def words(args: argparse.Namespace) -> list[str]:
    """The bits' part of a run's label: `g8`, `p5`; `g8`, `t0.1`; with bounds that are not the usual ones `b3-8`, in SGD `same`."""
    found = [f"g{args.group_size}"]
    if args.target_size is None or args.penalty != _usual_penalty(args):
        found.append(f"p{args.penalty:g}")
    if args.target_size is not None:
        found.append(f"t{args.target_size:g}")
    if (args.min_bits, args.max_bits) != (DEFAULTS["min_bits"], DEFAULTS["max_bits"]):
        found.append(f"b{args.min_bits:g}-{args.max_bits:g}")
    if args.bits_optimizer == "same":
        found.append("same")
    return found


def _usual_penalty(args):
    return PENALTY if args.target_size is None else TARGET_PENALTY


@dataclass
class LearnedBits:
    """The bits of a run's model in training."""

    optimizer: torch.optim.Optimizer  # the bits are its last group
    guard: object  # quantize.BitGuard, which skips and counts steps whose gradients are not finite
    penalty: float
    target_size: float | None  # MiB
    alone: bool  # in an optimizer of their own

    @property
    def group(self) -> dict:
        """The bits' parameter group."""
        return self.optimizer.param_groups[-1]

    def loss(self, model: nn.Module) -> Tensor:
        """What is added to the cross entropy."""
        return self.penalty * quantize.size_penalty(model, self.target_size)

    def state(self) -> dict:
        """For a checkpoint; without the main optimizer's state."""
        return {
            "optimizer": self.optimizer.state_dict() if self.alone else None,
            "steps": self.guard.steps,
            "skipped": self.guard.skipped,
        }

    def load_state(self, state: dict) -> None:
        """Continue where `state` was taken."""
        if self.alone:
            self.optimizer.load_state_dict(state["optimizer"])
        self.guard.steps, self.guard.skipped = state["steps"], state["skipped"]


def make_optimizers(args: argparse.Namespace, net: nn.Module) -> tuple[torch.optim.Optimizer, LearnedBits | None]:
    """SGD for the weights of `net`, and where bits are learned what moves them: an Adam of their own or a group of that SGD."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay)

    if args.weights != "diffq":
        return sgd(net.parameters()), None
    alone = args.bits_optimizer == "adam"
    optimizer = torch.optim.Adam([{"params": []}]) if alone else sgd(net.parameters())
    guard = quantize.add_bit_parameters(optimizer, net, args.bits_lr)
    bits = LearnedBits(optimizer, guard, args.penalty, args.target_size, alone)
    if args.target_size is not None:
        with blaming("--target-size", ValueError):
            bits.loss(net)  # a target that cannot be reached is better named now than after the first batch
    if not alone:
        return optimizer, bits
    own = set(bits.group["params"])
    return sgd([parameter for parameter in net.parameters() if parameter not in own]), bits


@torch.no_grad()
def numbers(model: nn.Module) -> dict[str, float]:
    """MiB of the file that `model` would be saved to now, less its header, and the average bits of its prepared weights."""
    training = model.training
    model.eval()  # whole bits, as the file has them
    found = {"size_mib": float(quantize.size_penalty(model)), "bits": average_bits(model)}
    model.train(training)
    return found


@torch.no_grad()
def average_bits(model: nn.Module) -> float:
    """Bits of a prepared weight, over all of them; 32 where none is prepared."""
    total = count = 0
    for name, bits in quantize.weight_bits(model).items():
        owner, _, tensor = name.rpartition(".")
        chain = model.get_submodule(owner).parametrizations[tensor]
        numel = chain.original.numel()
        each = bits.repeat_interleave(chain[0].group_size)[:numel] if bits.dim() else bits.expand(numel)
        total, count = total + float(each.double().sum()), count + numel
    return total / count if count else 32.0
