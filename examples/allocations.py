"""allocate.py's command line: methods, choices of bits and budgets, and what they mean to the package."""

import argparse
import math
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import quantize
from torch import nn

import options
from weights import BITS

# name: method and metric of quantize.measure_sensitivity. CLADO's code has four modes: naive, clado, its KL (clado_kl here), and its two
# flags together, which make zeroq.
METHODS = {
    "uniform": None,
    "naive": ("diagonal", "loss"),
    "zeroq": ("diagonal", "kl"),
    "gauss_newton": ("gauss_newton", "kl"),
    "composed": ("composed", "kl"),
    "clado": ("clado", "loss"),
    "clado_kl": ("clado", "kl"),
    "clado_positive": ("clado", "kl"),
}
MADE_POSITIVE = {"clado_positive": "clado_kl"}  # the same measurement, saturated and projected before bits are chosen by it
QUANTIZERS = ("uniform", "lsq", "po2", "po2plus")
# Of fine-tuning, unless other flags say so; all others are train.py's defaults.
RECIPE = ("--epochs", "2", "--lr", "0.02", "--lr-warmup-epochs", "0", "--batch-size", "64")
ELSEWHERE = ("weights", "resume", "resume2", "evaluate", "training_only", "gather_checkpoints")  # train.py's flags that mean nothing here

Choice = tuple[int, int | None]  # bits of a layer's weights, bits of its inputs


def parse(argv: list[str] | None = None) -> tuple[Namespace, Namespace, Namespace]:
    """Three sets of options: this script's; train.py's for fine-tuning; train.py's for the float model that is trained if none is given.

    A bad value ends the process with a message that names the flag.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    recipe = options.parse([*RECIPE, *rest])
    for name in ELSEWHERE:
        if getattr(recipe, name):
            parser.error(f"--{name.replace('_', '-')} does not belong here; see --help")
    for name, least in (("samples", 1), ("float_epochs", 1), ("float_lr", 0), ("time_limit", 0.001)):
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least:g}; got {getattr(args, name):g}")
    for name in ("choices", "activation_choices"):
        bits = getattr(args, name)
        if bits is not None and (not set(bits) <= set(BITS) or len(set(bits)) < len(bits)):
            parser.error(
                f"--{name.replace('_', '-')} must be different numbers from {BITS[0]} to {BITS[-1]}; got {' '.join(map(str, bits))}"
            )
    if args.average_bits is None and args.max_kib is None:
        args.average_bits = [2.5, 3.0, 4.0]
    for bits in args.average_bits or []:
        _check_average(parser, "average-bits", bits, "choices", args.choices)
    for kib in args.max_kib or []:
        if not kib > 0:
            parser.error(f"--max-kib must be above 0; got {kib:g}")
        if math.isinf(kib):
            parser.error(f"--max-kib must be finite; got {kib:g}")
    if args.average_activation_bits is not None:
        if not args.activation_choices or not args.average_bits:
            parser.error("--average-activation-bits needs --activation-choices and --average-bits")
        _check_average(parser, "average-activation-bits", args.average_activation_bits, "activation-choices", args.activation_choices)
    for name in ("methods", "average_bits", "max_kib"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or ())) or None)
    args.workspace = args.workspace or Path("runs") / f"{recipe.dataset}-{recipe.arch}-allocate-seed{recipe.seed}"
    warm_up = str(min(1, args.float_epochs))
    first = ["--epochs", str(args.float_epochs), "--lr", str(args.float_lr), "--lr-warmup-epochs", warm_up]
    return args, recipe, options.parse([*RECIPE, *rest, *first])


def _check_average(parser, name, average, of, bits):
    if not min(bits) <= average <= max(bits):
        parser.error(f"--{name} must be from {min(bits)} to {max(bits)}, the bits of --{of}; got {average:g}")


def build_parser() -> argparse.ArgumentParser:
    """This script's own flags."""
    about = "Choose the bits of every layer within a budget; fine-tune, pack and test what each method chooses."
    text = "Besides, train.py's flags about model, data, training and activation compression, which are those of fine-tuning "
    text += f"(python examples/train.py --help); unless given: {' '.join(RECIPE)}"
    parser = argparse.ArgumentParser("allocate.py", description=about, epilog=text, allow_abbrev=False)
    add = parser.add_argument_group("sensitivities").add_argument
    text = "uniform: the same bits everywhere, the most that fit; others by what they measure (see README.md): zeroq: KL, layer by layer; "
    text += "gauss_newton: KL to second order, with cross terms; composed: KL of pairs, from the same passes; clado, clado_kl: the growth "
    text += "of the loss, or KL, of every pair of layers, "
    text += "which takes long; clado_positive: clado_kl made a positive matrix, which 2 bits need; naive: the loss, layer by layer "
    text += "(default: uniform zeroq gauss_newton)"
    add("--methods", nargs="+", choices=METHODS, default=["uniform", "zeroq", "gauss_newton"], metavar="METHOD", help=text)
    add("--quantizer", choices=QUANTIZERS, default="uniform", help="levels of the weights, as train.py's --weights (default: uniform)")
    add("--choices", type=int, nargs="+", default=[2, 4, 8], metavar="B", help="bits that a layer's weights may have (default: 2 4 8)")
    text = "bits that a layer's inputs may have, each with each of --choices; not quantized if not given"
    add("--activation-choices", type=int, nargs="+", metavar="A", help=text)
    add("--float-layers", nargs="+", default=[], metavar="GLOB", help="layers left in full precision; none if not given")
    add("--samples", type=int, default=256, metavar="N", help="training images that are measured and calibrated on (default: 256)")

    add = parser.add_argument_group("budgets, each for every method").add_mutually_exclusive_group().add_argument
    text = "as many bytes as the file would take with all layers at so many bits, in between the --choices interpolated "
    add("--average-bits", type=float, nargs="+", metavar="B", help=text + "(default: 2.5 3 4)")
    add("--max-kib", type=float, nargs="+", metavar="K", help="so many KiB of the file, its header not counted")
    add = parser.add_argument_group("allocation").add_argument
    text = "besides, at most the bit operations of weights at --average-bits with inputs at so many bits; without it, inputs have the most"
    add("--average-activation-bits", type=float, metavar="A", help=text)
    add("--time-limit", type=float, default=10.0, metavar="S", help="seconds of an allocation's search for a proof (default: 10)")

    add = parser.add_argument_group("float model, where --init-from (a checkpoint of train.py) names none").add_argument
    add("--float-epochs", type=int, default=10, metavar="N", help="epochs of its training (default: 10)")
    add("--float-lr", type=float, default=0.1, metavar="LR", help="its peak learning rate (default: 0.1)")
    text = "folder of sensitivities, models, table and plots; what it holds already is not done again; "
    parser.add_argument("--workspace", type=Path, metavar="DIR", help=text + "runs/DATASET-ARCH-allocate-seedN if not given")
    return parser


class Budget(NamedTuple):
    """What an allocation may take."""

    name: str  # `2.5 bits` or `40 KiB`
    max_bytes: int  # of the file less its header
    max_product: float | None  # mean of weight bits times input bits over multiply-accumulates


def choices_of(args: Namespace) -> list[Choice]:
    """All pairs of bits, the fewest first."""
    return [(weight, activation) for weight in sorted(args.choices) for activation in sorted(args.activation_choices or [None], key=_bits)]


def _bits(activation: int | None) -> int:
    return activation or 32


def quantizer_of(args: Namespace):
    """What quantize.measure_sensitivity takes: a function of the bits of weights and inputs that returns a configuration."""
    return {
        "uniform": quantize.Uniform,
        "lsq": lambda weight, activation: quantize.Uniform(weight, activation, "learned"),
        "po2": lambda weight, activation: quantize.PowerOfTwo(weight, False, activation),
        "po2plus": lambda weight, activation: quantize.PowerOfTwo(weight, True, activation),
    }[args.quantizer]


def uniform_config(args: Namespace, choice: Choice) -> dict:
    """A configuration for prepare() with `choice` in every layer but `--float-layers`."""
    return {"*": quantizer_of(args)(*choice), **dict.fromkeys(args.float_layers)}


def check_float_layers(args: Namespace, model: nn.Module) -> None:
    """ValueError for globs that match none of the model's layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for glob in args.float_layers:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"--float-layers must match layers, from {names[0]} to {names[-1]}; {glob!r} matches none")
    if all(any(fnmatchcase(name, glob) for glob in args.float_layers) for name in names):
        raise ValueError(f"--float-layers must leave a layer to quantize; got {' '.join(args.float_layers)!r}, which matches all of them")


def budgets_of(args: Namespace, sizes: dict[Choice, int]) -> list[Budget]:
    """The budgets asked for. `sizes`: bytes of the file, less its header, with each choice in every layer."""
    if args.max_kib:
        budgets = [Budget(f"{kib:g} KiB", int(1024 * kib), None) for kib in args.max_kib]
        short = [budget for budget in budgets if budget.max_bytes < min(sizes.values())]
        if short:
            raise ValueError(
                f"--max-kib must be at least {min(sizes.values()) / 1024:.2f}, the smallest choice everywhere; got {short[0].name}"
            )
        return budgets
    # What a file has for activations, a step a layer, is the same for any number of their bits.
    by_bits = {weight: max(size for choice, size in sizes.items() if choice[0] == weight) for weight, _ in sizes}
    inputs = args.average_activation_bits
    return [Budget(f"{bits:g} bits", _interpolated(by_bits, bits), inputs and bits * inputs) for bits in args.average_bits]


def _interpolated(by_bits: dict[int, int], bits: float) -> int:
    low, high = max(b for b in by_bits if b <= bits), min(b for b in by_bits if b >= bits)
    share = (bits - low) / (high - low) if high > low else 0
    return int(by_bits[low] + share * (by_bits[high] - by_bits[low]))


def largest_uniform(budget: Budget, sizes: dict[Choice, int]) -> Choice:
    """The choice of the most bits that fits the budget in every layer; ValueError if none does."""
    fitting = [c for c, size in sizes.items() if size <= budget.max_bytes and not (budget.max_product and _product(c) > budget.max_product)]
    if not fitting:
        raise ValueError(f"--methods uniform: the smallest choice must fit the budget; {budget.name} is too little for {min(sizes)}")
    return max(fitting, key=lambda choice: (choice[0], _bits(choice[1])))


def _product(choice: Choice) -> int:
    return choice[0] * _bits(choice[1])


def max_bit_ops(budget: Budget, sensitivity) -> int | None:
    """The limit for quantize.allocate."""
    if budget.max_product is None:
        return None
    macs = sensitivity.bit_ops[:, 0].double() / _product(sensitivity.choices[0])
    return int(macs.sum() * budget.max_product)


def choice_text(choice: Choice) -> str:
    """`w4` or `w4a8`."""
    return f"w{choice[0]}" + (f"a{choice[1]}" if choice[1] else "")


def layers_of(prepared: nn.Module) -> list[str]:
    """Names of the layers with quantized weights."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in quantize.weight_bits(prepared)))
