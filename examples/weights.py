"""Low-bit weights: the flags that train.py has for them, what they mean to quantize.prepare, and what is measured on a prepared model."""

import argparse
import re
from fnmatch import fnmatchcase

import quantize
import torch
from torch import nn

import few_bits
import learned_bits

QUANTIZERS = ("po2", "po2plus", "uniform", "lsq", "ternary")  # with a number of bits that is given, for any network; "diffq" learns it
GIVEN = (*QUANTIZERS, *few_bits.METHODS)
METHODS = (*GIVEN, "diffq")
FLOAT = "float"  # what checkpoints call weights in full precision
BITS = tuple(range(2, 9))
# Bits that a method can have, the usual number first; of all others BITS.
WEIGHT_BITS = {**dict.fromkeys(QUANTIZERS, (4, *BITS)), "ternary": (2,), **few_bits.WEIGHT_BITS}
ACTIVATION_BITS = few_bits.ACTIVATION_BITS


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of low-bit weights."""
    add = parser.add_argument_group("low-bit weights").add_argument
    text = (
        "powers of two, nearest powers of two, evenly spaced levels, such with a learned step, ternary, binary (XNOR-Net), DoReFa-Net's, "
    )
    add("--weights", choices=METHODS, help=text + "or with learned bits (DiffQ); full precision if not given")
    add(
        "--weight-bits",
        type=int,
        metavar="B",
        help="bits of a weight, 2 to 8 (4 if not given), ternary: 2, xnor: 1, dorefa: 1 to 8 or 16 (2)",
    )
    text = (
        "bits of the quantized layers' inputs, 2 to 8 with a learned step, xnor: 1, dorefa: 1 to 8 or 16; 32: not quantized; if not given "
    )
    text += "xnor: 1, dorefa: --weight-bits, else 32"
    add("--activation-bits", "--weight-activation-bits", type=int, metavar="A", help=text)
    text = "layers left in full precision, no GLOB: none; if not given xnor, dorefa: the first convolution and the last layer, else none"
    add("--float-layers", nargs="*", metavar="GLOB", help=text)
    few_bits.add_flags(parser)


def check(args: argparse.Namespace, error) -> None:
    """Fill in the defaults; `error(text)` for flags that do not go together."""
    methods = {"weight_bits": GIVEN, "activation_bits": METHODS, "float_layers": METHODS}
    for name, those in methods.items():
        if getattr(args, name) is not None and args.weights not in those:
            error(f"--{name.replace('_', '-')} belongs to --weights {'|'.join(those)}")
    if args.weights in GIVEN:
        _check_bits("weight", args, WEIGHT_BITS[args.weights], error)
    if args.weights in few_bits.METHODS and args.activation_bits is None:
        args.activation_bits = args.weight_bits
    if args.activation_bits == 32:
        args.activation_bits = None
    if args.activation_bits is not None:
        _check_bits("activation", args, ACTIVATION_BITS.get(args.weights, BITS), error)
    few_bits.check(args, error)


def _check_bits(kind: str, args, choices: tuple[int, ...], error) -> None:
    name = f"{kind}_bits"
    bits = choices[0] if getattr(args, name) is None else getattr(args, name)
    setattr(args, name, bits)
    if bits in choices:
        return
    wanted = span(choices)
    wanted += "" if set(choices) == set(BITS) else f" with --weights {args.weights}"
    wanted += ", or 32 for none" if kind == "activation" else ""
    error(f"--{kind}-bits must be {wanted}; got {bits}")


def span(choices: tuple[int, ...]) -> str:
    """Bits in words: `1`, `from 2 to 8`, `from 1 to 8 or 16`."""
    low, high = min(choices), max(choices)
    return f"{low}" if low == high else f"from {low} to 8 or {high}" if high > 8 else f"from {low} to {high}"


def label(args: argparse.Namespace) -> str:
    """The weights of a run in a word, for folders and checkpoints: `po2plus-4`, `uniform-8-a8`, `po2-3-float_conv1_fc`, `diffq-g8-p5`,
    `dorefa-2-a2`, `float`."""
    if args.weights is None:
        return FLOAT
    words = [args.weights, *(learned_bits.words(args) if args.weights == "diffq" else [str(args.weight_bits)])]
    if args.activation_bits is not None:
        words.append(f"a{args.activation_bits}")
    words += few_bits.words(args)
    if args.float_layers or (args.float_layers is not None and args.weights in few_bits.METHODS):
        words.append("_".join(["float", *(re.sub(r"[^\w.*]", "+", glob) for glob in args.float_layers or ["none"])]))
    return "-".join(words)


def prepare(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """`model`, every convolution and linear layer of it but `--float-layers` prepared for `--weights`.

    Where these are not given, `few_bits.METHODS` leave out the first convolution and the last layer, the others quantize them like all
    others, as the PO2+ and DiffQ experiments do; with few classes they are a small part of the file.
    """
    left_out = list(args.float_layers or ())
    if args.float_layers is None and args.weights in few_bits.METHODS:
        left_out = few_bits.ends(model)
    names = [name for name, module in model.named_modules() if name]
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for glob in left_out:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"--float-layers: expected globs over names from {layers[0]} to {layers[-1]}; got {glob!r}, which fits none")
    if all(any(fnmatchcase(name, glob) for glob in left_out) for name in layers):
        raise ValueError(f"--float-layers: expected to leave a layer to quantize; got {' '.join(left_out)!r}, which fits all of them")
    if args.weights in few_bits.METHODS:
        config = few_bits.config(args, model)
    elif args.weights == "diffq":
        config = quantize.DiffQ(args.group_size, args.min_bits, args.max_bits, args.init_bits, activation_bits=args.activation_bits)
    elif args.weights == "ternary":
        config = quantize.Ternary(args.activation_bits)
    elif args.weights in ("uniform", "lsq"):
        scale = "learned" if args.weights == "lsq" else "least_squares"
        config = quantize.Uniform(args.weight_bits, args.activation_bits, scale)
    else:
        config = quantize.PowerOfTwo(args.weight_bits, args.weights == "po2plus", args.activation_bits)
    return quantize.prepare(model, {"*": config, **dict.fromkeys(left_out)})


@torch.no_grad()
def relative_mse(model: nn.Module) -> float:
    """Sum of (quantized - full precision weight)² over all prepared weights of `model`, in units of the sum of their squares."""
    error = power = 0.0
    for name in quantize.weight_bits(model):
        owner, _, tensor = name.rpartition(".")
        module = model.get_submodule(owner)
        latent = module.parametrizations[tensor].original
        error += float((getattr(module, tensor) - latent).double().square().sum())
        power += float(latent.double().square().sum())
    return error / power if power else 0.0
