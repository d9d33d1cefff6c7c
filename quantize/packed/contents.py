"""What a converted model holds and a file stores: its packed layers, each an entry of JSON, and every other tensor once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .grid import Grid
from .modules import ATTRIBUTES, TENSORS, InputQuantizer, PackedLayer
from .plain import kind_of
from .weight import PackedWeight


class Item(NamedTuple):
    """A stored tensor. `layer`: the module that it belongs to, by name; `weight`: the packed parameter, or empty."""

    layer: str
    weight: str
    tensor: Tensor


class Contents(NamedTuple):
    """`layers`: JSON entries in module order. `tensors`: what is stored, by its name in the file."""

    layers: list[dict]
    tensors: dict[str, Item]


def join(*parts: str) -> str:
    """Names, with dots between those that are not empty."""
    return ".".join(part for part in parts if part)


def is_dense(tensor: Tensor) -> bool:
    """Whether it is one block of elements, which has an address."""
    return not tensor.is_nested and tensor.layout == torch.strided


def identity(tensor: Tensor) -> object:
    """What tied tensors have in common."""
    if not is_dense(tensor) or tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights that stand behind `module`'s decoded ones, by parameter name."""
    return vars(module).get("packed_weights", {})


def input_grid(module: nn.Module) -> InputQuantizer | None:
    """The grid of the input of a module with a decoded weight."""
    own = module._modules.get("activation_quantizer")
    return own if isinstance(own, InputQuantizer) else None


def own_tensors(module: nn.Module, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters and persistent buffers, in the order of their names."""
    for name, tensor in sorted({**module._parameters, **module._buffers}.items()):
        if tensor is not None and name not in without and name not in module._non_persistent_buffers_set:
            yield name, tensor


def attributes(module: nn.Module) -> dict:
    """What distinguishes layers of the same kind and shape, without defaults."""
    found = {}
    for name, default in ATTRIBUTES.items():
        value = getattr(module, name, default)
        if isinstance(value, (tuple, list)):
            value = list(value)
        usual = [default] * len(value) if isinstance(value, list) else default
        if value != usual and isinstance(value, (int, str, list)):  # subclasses may hold anything under these names
            found[name] = value
    return found


def renamed(module: PackedLayer, now: str, other: str) -> str:
    """The present name of what was called `other` when `module` was packed: the containers around them may be others by now."""
    before, after = module.placed.split("."), now.split(".")
    while before and after and before[-1] == after[-1]:
        before.pop(), after.pop()
    parts = other.split(".")
    if parts[: len(before)] != before:
        return other  # outside them: no longer there, or where it was
    return ".".join([*after, *parts[len(before) :]])


def entry_of(name: str, module: nn.Module, weight: PackedWeight, tensor: str, grid: Grid | None) -> dict:
    """The JSON of one packed weight. What is usual is left out."""
    entry = {"name": name, "kind": kind_of(module), **weight.form.fields()}
    if grid is not None:
        entry |= grid.fields()
    entry |= attributes(module)
    if tensor in vars(module).get("staying", ()):
        entry["stays"] = True
    if not isinstance(module, PackedLayer):
        return {**entry, "decoded": tensor}
    if not module.plain_bias:
        entry["bias"] = False
    if module.feeds is not None:
        entry["feeds"] = module.feeds
    if module.folded is not None:
        entry["batch_norm"], entry["batch_norm_bytes"] = module.folded
    if module.placed != name:
        for field in ("feeds", "batch_norm"):
            if field in entry:
                entry[field] = renamed(module, name, entry[field])
        if "removed" in entry:
            entry["removed"] = [renamed(module, name, other) for other in entry["removed"]]
    return entry


def _check_others(entry: dict, module: nn.Module, modules: dict[str, nn.Module], who: str) -> None:
    """That the modules an entry speaks of are in the model, as they were left."""
    empty = [*entry.get("removed", ()), *([entry["batch_norm"]] if "batch_norm" in entry else [])]
    lost = [other for other in empty if type(modules.get(other)) is not nn.Identity]
    if "feeds" in entry and modules.get(entry["feeds"]) is not module._next:
        lost.append(entry["feeds"])
    if lost:
        raise ValueError(f"{who}: layer {entry['name']!r} was converted together with {lost[0]!r}, which must be in the model too")


def packed_parts(name: str, module: nn.Module) -> Iterator[tuple[str, PackedWeight, dict, dict[str, Tensor]]]:
    """For each packed weight of `module`: its name, itself, its JSON, and its tensors by their names under the module's."""
    if isinstance(module, PackedLayer):
        weight = module.packed_weight
        entry = entry_of(name, module, weight, "weight", module.grid)
        yield "weight", weight, entry, {part: t for part in TENSORS if (t := module._buffers.get(part)) is not None}
        return
    for tensor, weight in packed_weights(module).items():
        own = input_grid(module) if tensor == "weight" else None
        grid = None if own is None else own.grid
        parts = {**weight.parts, **({} if grid is None else grid.parts)}
        yield tensor, weight, entry_of(name, module, weight, tensor, grid), {f"{tensor}.{part}": t for part, t in parts.items()}


def contents(model: nn.Module, who: str) -> Contents:
    """Of a converted model. Tied tensors appear once, under the name that comes first. `who` asks, for errors."""
    layers, tensors, seen, grids = [], {}, {}, set()

    def add(name: str, item: Item) -> str:
        if not is_dense(item.tensor):
            found = "a nested one" if item.tensor.is_nested else item.tensor.layout
            raise ValueError(f"{who}: {name!r} must be a dense tensor; got {found}")
        first = seen.setdefault(identity(item.tensor), name)
        if first == name and tensors.setdefault(name, item) is not item:
            raise ValueError(f"{who}: two tensors of the model have the name {name!r}")
        return first

    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module in grids:
            continue
        stored = set(TENSORS) if isinstance(module, PackedLayer) else set(packed_weights(module))
        for weight, _, entry, parts in packed_parts(name, module):
            _check_others(entry, module, modules, who)
            layers.append(entry)
            tied = {part: first for part, t in parts.items() if (first := add(join(name, part), Item(name, weight, t))) != join(name, part)}
            if tied:
                entry["tied"] = tied
            grids.add(input_grid(module))
        for part, tensor in own_tensors(module, stored):
            add(join(name, part), Item(name, "", tensor))
    return Contents(layers, tensors)


def stored_bytes(tensors: dict[str, Item]) -> int:
    """What save() writes, less its header."""
    return sum(item.tensor.nbytes for item in tensors.values())
