"""What a checkpoint says of the training that wrote it, where a script is not told."""

import argparse
from pathlib import Path

import torch

import few_bits
import learned_bits

MODEL = ("arch", "width", "num_classes", "dataset", "image_size", "weights")
LOW_BIT = ("weight_bits", "activation_bits", "float_layers", *few_bits.BELONGS, *learned_bits.DEFAULTS, "penalty", "target_size")


def options_of(file: Path) -> dict:
    """train.py's options that decided about its numbers; none of a file that is no checkpoint, which reading it says better."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(content["options"])
    except Exception:  # whatever a damaged pickle or zip raises
        return {}


def model_options(file: Path, given: argparse.Namespace) -> dict:
    """Those of them that say which model the file holds; of the bits and the like only where `given` asks for no other weights."""
    found = options_of(file)
    names = MODEL if given.weights not in (None, found.get("weights")) else (*MODEL, *LOW_BIT)
    method = found.get("weights")
    options = {name: found[name] for name in names if name in found and few_bits.BELONGS.get(name, method) == method}
    if options.get("weights") and options.get("activation_bits", 32) is None:
        options["activation_bits"] = 32  # as flags say it: without one, some methods take a number of their own
    return options
