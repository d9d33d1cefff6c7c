"""What the arguments of Sensitivity must be. Files hold them, too, and may be hostile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checks import check_integer, is_integer
from ..weight.config import WeightConfig
from .choices import Choice, choice_text

WHO = "Sensitivity"


def names_of(layers) -> tuple[str, ...]:
    """`layers`: at least one, all different."""
    found = [None] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{WHO}: layers must be names; got {layers!r}")
    if not found:
        raise ValueError(f"{WHO}: layers must be at least one name; got none")
    if len(set(found)) < len(found):
        twice = next(name for i, name in enumerate(found) if name in found[:i])
        raise ValueError(f"{WHO}: layers must be different names; got {twice!r} twice")
    return tuple(found)


def numbers_of(name: str, table, who: str = WHO) -> Tensor:
    """`table` on the CPU as float64 or int64."""
    if isinstance(table, Tensor) and (table.is_nested or table.is_meta or table.layout != torch.strided):
        found = "a nested one" if table.is_nested else "one on meta" if table.is_meta else table.layout
        raise TypeError(f"{who}: {name} must be a dense Tensor with values; got {found}")
    try:
        table = torch.as_tensor(table).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{who}: {name} must be a Tensor or rows of real numbers; got {table!r}") from error
    if table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"{who}: {name} must be of real numbers; got {table.dtype}")
    return table.double() if table.is_floating_point() else table.long()


def check_finite(name: str, table: Tensor, layers: Sequence[str], choices: Sequence[Choice], least: float | None, who: str = WHO) -> None:
    """ValueError for NaN and infinite numbers, and those below `least`: of a table [L, K], or without `least` of a matrix [L*K, L*K]."""
    wrong = ~table.isfinite() if least is None else ~table.isfinite() | (table < least)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        at = [(row, column)] if least is not None else [divmod(row, len(choices)), divmod(column, len(choices))]
        places = " with ".join(f"{layers[layer]!r} at {choice_text(choices[choice])}" for layer, choice in dict.fromkeys(at))
        expected = "finite" if least is None else f"finite and at least {least}"
        raise ValueError(f"{who}: {name} must be {expected}; got {table[row, column].item()} for {places}")


def configs_of(configs, count: int) -> tuple[WeightConfig | None, ...]:
    """`configs`, one for each of `count` choices."""
    found = list(configs) if isinstance(configs, Iterable) else [configs]
    wrong = [config for config in found if config is not None and not isinstance(config, WeightConfig)]
    if wrong:
        raise TypeError(f"{WHO}: configs must be configurations such as quantize.Uniform or None; got {wrong[0]!r}")
    if len(found) != count:
        raise ValueError(f"{WHO}: configs must be {count}, one for each choice; got {len(found)}")
    return tuple(found)


def members_of(members, layers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The modules of every layer: its own name where `members` has none."""
    expected = f"{WHO}: members must be a mapping from layers to names"
    if members is not None and not isinstance(members, Mapping):
        raise TypeError(f"{expected}; got {members!r}")
    for layer, own in (members or {}).items():
        if layer not in layers:
            raise ValueError(f"{WHO}: members must be of the layers; got {layer!r}, which is none")
        if isinstance(own, str) or not isinstance(own, Sequence) or not all(isinstance(name, str) for name in own):
            raise TypeError(f"{expected}; got {own!r} for {layer!r}")
        if not own:
            raise ValueError(f"{WHO}: members must be at least one for each layer; got none for {layer!r}")
    found = {layer: tuple((members or {}).get(layer, (layer,))) for layer in layers}
    every = [name for own in found.values() for name in own]
    twice = next((name for i, name in enumerate(every) if name in every[:i]), None)
    if twice is not None:
        raise ValueError(f"{WHO}: members must be in one layer each; got {twice!r} twice")
    return found


def shapes_of(shapes, members: Mapping[str, Sequence[str]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of the weights of all members, or none."""
    try:
        found = {
            module: {tensor: tuple(shape) for tensor, shape in own.items()}
            for module, own in (shapes if shapes is not None else {}).items()
        }
        sizes = [size for own in found.values() for shape in own.values() for size in shape]
        if not all(is_integer(size) and size >= 0 for size in sizes):
            raise TypeError(f"sizes are {sizes[:8]}")
        found = {module: {tensor: tuple(map(int, shape)) for tensor, shape in own.items()} for module, own in found.items()}
    except (AttributeError, TypeError) as error:
        raise TypeError(f"{WHO}: shapes must be a mapping {{module: {{tensor: shape}}}}; got {shapes!r}") from error
    missing = [name for own in members.values() for name in own if found and name not in found]
    if missing:
        raise ValueError(f"{WHO}: shapes must have all members; {missing[0]!r} is missing")
    return found


def count_of(name: str, value) -> int:
    """A number of something."""
    check_integer(WHO, name, value, 0, 2**63 - 1, "an integer from 0 to 2^63 - 1")
    return int(value)


def text_of(name: str, value) -> str:
    """A word or none."""
    if not isinstance(value, str):
        raise TypeError(f"{WHO}: {name} must be a string; got {value!r}")
    return value
