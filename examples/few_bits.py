"""Weights and activations of very few bits (`--weights xnor|dorefa`): their flags, and what they mean to quantize.prepare.

Their quantizers are for networks that are built and trained with them: the models whose names end in `_q`.
"""

import argparse
import warnings

import quantize
from torch import nn

METHODS = ("xnor", "dorefa")
DOREFA_BITS = (2, 1, *range(3, 9), 16)  # the usual number first
WEIGHT_BITS = {"xnor": (1,), "dorefa": DOREFA_BITS}
ACTIVATION_BITS = {"xnor": (1,), "dorefa": DOREFA_BITS}
SIGN_GRADIENTS = ("clip", "polynomial")
# Of --reestimate-bn: with few bits running averages lag so far behind the weights that tests at a high learning rate say little.
BATCHES = 100
DEFAULTS = {"gradient_bits": 32, "rectify": None, "sign_gradient": "clip", "scale_adjusted": True}
BELONGS = {"gradient_bits": "dorefa", "rectify": "xnor", "sign_gradient": "xnor", "scale_adjusted": "dorefa"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of these methods."""
    add = parser.add_argument_group("binary networks, of --weights xnor|dorefa").add_argument
    add(
        "--gradient-bits",
        type=int,
        metavar="G",
        help="dorefa: bits of the layers' gradients, 2 to 8 or 16; 32, not quantized, if not given",
    )
    add(
        "--rectify",
        type=float,
        metavar="TAU",
        help="xnor: clamp latent weights to these quantiles (ReCU), to 1; not at all if not given",
    )
    add(
        "--sign-gradient",
        choices=SIGN_GRADIENTS,
        help="xnor: of activations' signs, 1 or 2 - 2|x| (Bi-Real Net) within -1 to 1; clip if not given",
    )
    text = "dorefa: scale weights of 2 bits and more back to the latent ones' deviation; on if not given"
    add("--scale-adjusted", action=argparse.BooleanOptionalAction, default=None, help=text)


def check(args: argparse.Namespace, error) -> None:
    """Fill in the defaults; `error(text)` for flags that do not go together."""
    if args.reestimate_bn is None:
        args.reestimate_bn = BATCHES if args.weights in METHODS and not args.evaluate else 0  # a checkpoint has its own
    if args.reestimate_bn < 0:
        error(f"--reestimate-bn must not be negative; got {args.reestimate_bn}")
    for name, method in BELONGS.items():
        if getattr(args, name) is not None and args.weights != method:
            error(f"--{name.replace('_', '-')} belongs to --weights {method}")
    if args.weights not in METHODS:
        return
    for name, value in DEFAULTS.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.gradient_bits not in (*range(2, 9), 16, 32):
        error(f"--gradient-bits must be from 2 to 8, 16 or 32; got {args.gradient_bits}")
    if args.rectify is not None and not 0.5 < args.rectify <= 1:
        error(f"--rectify must be above 0.5 and at most 1; got {args.rectify:g}")


def words(args: argparse.Namespace) -> list[str]:
    """Their part of a run's label: `g6`, `rectify0.99`, `polynomial`, `unscaled`, where it is not the usual."""
    if args.weights not in METHODS:
        return []
    found = [f"g{args.gradient_bits}"] if args.gradient_bits != 32 else []
    found += [f"rectify{args.rectify:g}"] if args.rectify is not None else []
    found += [args.sign_gradient] if args.sign_gradient != DEFAULTS["sign_gradient"] else []
    return found + (["scaled" if args.scale_adjusted else "unscaled"] if args.scale_adjusted != DEFAULTS["scale_adjusted"] else [])


def ends(model: nn.Module) -> list[str]:
    """Names of the first convolution and of the last layer, which the papers leave in full precision."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    first = next((name for name, module in layers.items() if isinstance(module, nn.Conv2d)), None)
    return list(dict.fromkeys(name for name in (first, *list(layers)[-1:]) if name is not None))


def config(args: argparse.Namespace, model: nn.Module):
    """What `args` ask quantize.prepare for. Warns where the signs of `model`'s activations would all be the same."""
    if args.weights == "dorefa":
        return quantize.DoReFa(args.weight_bits, args.activation_bits, args.gradient_bits, scale_adjusted=args.scale_adjusted)
    if args.activation_bits and not any(isinstance(module, nn.Hardtanh) for module in model.modules()):
        text = f"--weights xnor: the rectifiers of {args.arch} leave no negative activations, so all signs are +1; take a model named *_q"
        warnings.warn(text, stacklevel=2)
    return quantize.XNOR(args.activation_bits, rectify=args.rectify, sign_gradient=args.sign_gradient)
