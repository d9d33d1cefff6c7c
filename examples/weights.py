"""Low-bit weights: the flags that train.py has for them, what they mean to quantize.prepare, and what is measured on a prepared model."""

import argparse
import re
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

import learned_bits

QUANTIZERS = ("po2", "po2plus", "uniform", "lsq", "ternary")  # with a number of bits that is given; "diffq" learns it
FLOAT = "float"  # what checkpoints call weights in full precision


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of low-bit weights."""
    add = parser.add_argument_group("low-bit weights").add_argument
    text = "powers of two, nearest powers of two, evenly spaced levels, such with a learned step, ternary, or with learned bits (DiffQ); "
    add("--weights", choices=(*QUANTIZERS, "diffq"), help=text + "full precision if not given")
    add("--weight-bits", type=int, metavar="B", help="bits of a weight, 2 to 8; 4 if not given, 2 if ternary")
    add("--weight-activation-bits", type=int, metavar="A", help="quantize the layers' inputs too, to 2 to 8 bits with a learned step")
    add("--float-layers", nargs="+", metavar="GLOB", help="layers left in full precision; none if not given, not even first and last")


def check(args: argparse.Namespace, error) -> None:
    """Fill in the defaults; `error(text)` for flags that do not go together."""
    methods = {"weight_bits": QUANTIZERS, "weight_activation_bits": (*QUANTIZERS, "diffq"), "float_layers": (*QUANTIZERS, "diffq")}
    for name, those in methods.items():
        if getattr(args, name) is not None and args.weights not in those:
            error(f"--{name.replace('_', '-')} belongs to --weights {'|'.join(those)}")
    if args.weights in QUANTIZERS:
        usual = 2 if args.weights == "ternary" else 4
        args.weight_bits = usual if args.weight_bits is None else args.weight_bits
        if args.weights == "ternary" and args.weight_bits != usual:
            error(f"--weight-bits must be 2 with --weights ternary; got {args.weight_bits}")
    for name in ("weight_bits", "weight_activation_bits"):
        bits = getattr(args, name)
        if bits is not None and not 2 <= bits <= 8:
            error(f"--{name.replace('_', '-')} must be from 2 to 8; got {bits}")


def label(args: argparse.Namespace) -> str:
    """The weights of a run in a word, for folders and checkpoints: `po2plus-4`, `uniform-8-a8`, `po2-3-float_conv1_fc`, `diffq-g8-p5`,
    `float`."""
    if args.weights is None:
        return FLOAT
    words = [args.weights, *(learned_bits.words(args) if args.weights == "diffq" else [str(args.weight_bits)])]
    if args.weight_activation_bits is not None:
        words.append(f"a{args.weight_activation_bits}")
    if args.float_layers:
        words.append("_".join(["float", *(re.sub(r"[^\w.*]", "+", glob) for glob in args.float_layers)]))
    return "-".join(words)


def prepare(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """`model`, every convolution and linear layer of it but `--float-layers` prepared for `--weights`.

    The first and the last layer are quantized like all others, as in the original; with few classes they are a small part of the file.
    """
    import quantize

    names = [name for name, module in model.named_modules() if name]
    for glob in args.float_layers or ():
        if not any(fnmatchcase(name, glob) for name in names):
            layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
            raise ValueError(f"--float-layers: expected globs over names from {layers[0]} to {layers[-1]}; got {glob!r}, which fits none")
    if args.weights == "diffq":
        config = quantize.DiffQ(args.group_size, args.min_bits, args.max_bits, args.init_bits, activation_bits=args.weight_activation_bits)
    elif args.weights == "ternary":
        config = quantize.Ternary(args.weight_activation_bits)
    elif args.weights in ("uniform", "lsq"):
        scale = "learned" if args.weights == "lsq" else "least_squares"
        config = quantize.Uniform(args.weight_bits, args.weight_activation_bits, scale)
    else:
        config = quantize.PowerOfTwo(args.weight_bits, args.weights == "po2plus", args.weight_activation_bits)
    return quantize.prepare(model, {"*": config, **dict.fromkeys(args.float_layers or ())})


@torch.no_grad()
def relative_mse(model: nn.Module) -> float:
    """Sum of (quantized - full precision weight)² over all prepared weights of `model`, in units of the sum of their squares."""
    import quantize

    error = power = 0.0
    for name in quantize.weight_bits(model):
        owner, _, tensor = name.rpartition(".")
        module = model.get_submodule(owner)
        latent = module.parametrizations[tensor].original
        error += float((getattr(module, tensor) - latent).double().square().sum())
        power += float(latent.double().square().sum())
    return error / power if power else 0.0


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: list[Tensor]) -> None:
    """Replace running means and variances by the average over `batches`: quantized weights shift what the batch norms see."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    model.train()
    for images in batches:
        model(images)
    model.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
