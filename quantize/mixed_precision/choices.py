"""Choices of bits: pairs (weight bits, activation bits), and the weight configurations that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..checks import is_integer
from ..weight.config import XNOR, DiffQ, DoReFa, PowerOfTwo, Ternary, Uniform, WeightConfig

Choice = tuple[int | None, int | None]
BY_NAME = {cls.__name__: cls for cls in (Uniform, PowerOfTwo, Ternary, XNOR, DoReFa, DiffQ)}
# How a class is given a choice; others are called as quantizer(weight_bits, activation_bits).
MAKE: dict[type, Callable[[int, int | None], WeightConfig]] = {
    PowerOfTwo: lambda weight, activation: PowerOfTwo(weight, activation_bits=activation),
    Ternary: lambda weight, activation: Ternary(activation_bits=activation),
    XNOR: lambda weight, activation: XNOR(activation_bits=activation),
    DiffQ: lambda weight, activation: DiffQ(min_bits=weight, max_bits=weight, init_bits=weight, activation_bits=activation),
}


def check_choices(choices, who: str) -> tuple[Choice, ...]:
    """`choices` as a tuple of pairs. TypeError or ValueError otherwise."""
    expected = f"{who}: choices must be pairs (weight_bits, activation_bits) of integers or None"
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise TypeError(f"{expected}; got {choices!r}")
    if not choices:
        raise ValueError(f"{expected}, at least one; got none")
    pairs = []
    for pair in choices:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"{expected}; got {pair!r}")
        for bits in pair:
            if bits is not None and not is_integer(bits):
                raise TypeError(f"{expected}; got {pair!r}")
            if bits is not None and bits < 1:
                raise ValueError(f"{expected} of at least 1; got {pair!r}")
        pairs.append(tuple(None if bits is None else int(bits) for bits in pair))
    if len(set(pairs)) < len(pairs):
        twice = next(pair for i, pair in enumerate(pairs) if pair in pairs[:i])
        raise ValueError(f"{who}: choices must differ; got {twice} twice")
    return tuple(pairs)


def config_of(quantizer, choice: Choice, who: str) -> WeightConfig | None:
    """What `quantizer` makes of a choice; None, which prepare() leaves alone, of (None, None)."""
    weight, activation = choice
    if weight is None:
        if activation is not None:
            raise ValueError(f"{who}: choices without weight_bits must be (None, None), a layer in full precision; got {choice}")
        return None
    made = MAKE.get(quantizer, quantizer)(weight, activation)
    if not isinstance(made, WeightConfig):
        raise TypeError(f"{who}: quantizer must return a configuration such as quantize.Uniform; got {made!r} for {choice}")
    if isinstance(made.activation_bits, str):
        raise ValueError(f"{who}: quantizer must return a configuration of fixed bits; got activation_bits {made.activation_bits!r}")
    if quantizer in MAKE and weight_bits_of(made) != weight:
        raise ValueError(f"{who}: choices with {quantizer.__name__} must have weight_bits {weight_bits_of(made)}; got {choice}")
    return made


def weight_bits_of(config: WeightConfig) -> float:
    """Bits of a weight, of learned ones those they start with."""
    return config.init_bits if isinstance(config, DiffQ) else config.weight_bits


def describe(config: WeightConfig | None) -> dict | None:
    """As a file's JSON has it."""
    return config and {"class": type(config).__name__, **dataclasses.asdict(config)}


def restore(entry) -> WeightConfig | None:
    """The inverse of :func:`describe`. ValueError for anything else."""
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.get("class") not in BY_NAME:
        raise ValueError(f"expected one of {', '.join(BY_NAME)}; got {entry!r}")
    fields = {name: value for name, value in entry.items() if name != "class"}
    try:
        return BY_NAME[entry["class"]](**fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


def choice_text(choice: Choice) -> str:
    """`w4`, `w4a8` or `float`."""
    weight, activation = choice
    return "float" if weight is None else f"w{weight}" + (f"a{activation}" if activation is not None else "")
