"""What is done with a convolution's output right behind it: a residual sum, a clip, the levels of the next convolution's input; behind a
first one that stays float (stems.py) a batch norm, a clip, a max pool.

Where a trace shows that one of them is the very next thing, the layer does not compute its output but hands on a Pending (pending.py),
which computes them in the same pass. The same float32 roundings in the same order, so the same result, but for the batch norm.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from .clips import CLIPS
from .grid import SignGrid, StepGrid
from .modules import PackedConv2d
from .pending import ADD, CLIP, CODES, NORM, POOL
from .plain import forward_of_its_own, plain_class, shell
from .pools import goes_with_stem
from .region import region_of
from .stems import PackedBatchNorm2d, PackedStemConv2d
from .trace import Calls, collected, containers, unwatched

Grids = dict[nn.Module, type | None]  # of inputs, by layer; None: a first convolution that stays float
_SWAPPED = {**CLIPS, nn.BatchNorm2d: PackedBatchNorm2d}  # what must know an output that waits
_BEHIND_STEMS = (NORM, CLIP, POOL)  # in this order
_CLIP_CALLS = {F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, "relu", "relu_"}


@torch.no_grad()
def find_chains(model: nn.Module) -> None:
    """Marks the convolutions of `model` whose outputs are computed with what comes after them."""
    stems = {name: m for name, m in model.named_modules() if isinstance(m, PackedStemConv2d)}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, PackedConv2d) and m.grid is not None} | stems
    if not convs:
        return
    copied = shell(model, "convert").eval()
    grids = {copied.get_submodule(name): None if name in stems else type(m.grid) for name, m in convs.items()}
    unseen = unwatched(copied, set(copied.modules()))
    every = {m: name for name, m in copied.named_modules()}
    wanted = {*grids, *(m for m in copied.modules() if plain_class(type(m)) in (*_SWAPPED, nn.MaxPool2d, nn.Identity))}
    for layer, steps, between, root in collected(copied, wanted, lambda root, graph: _chains(root, graph, grids, unseen, every)):
        packed = convs[every[layer]]
        vars(packed).update(_steps=steps, _region=region_of(model.get_submodule(root)))
        passed = [model.get_submodule(name) for name in between]
        packed.watch(*passed)
        for module in passed:
            if type(module) in _SWAPPED and not forward_of_its_own(module):
                module.__class__ = _SWAPPED[type(module)]


def _chains(root: nn.Module, graph: fx.Graph, grids: Grids, unseen: set[nn.Module], every: dict[nn.Module, str]) -> list:
    """(layer, steps, names of the modules that see its output on its way, the root's name). Nothing may come between: the input might
    change."""
    calls, found = Calls(root, graph), []
    within = every[root]

    def around(node: fx.Node) -> set[str]:
        stack = containers(node.target) if node.op == "call_module" else set(node.meta.get("nn_module_stack", ()))
        return {name for name in stack if name}

    for node in calls.nodes:
        layer = calls.link(node)
        if layer not in grids or layer not in unseen:
            continue
        output, steps, passed, seen = node, [], [], set()
        stem = grids[layer] is None
        signs = not stem and issubclass(grids[layer], SignGrid)
        while True:
            step = _behind_stem(calls, output, steps, unseen) if stem else _step(calls, output, steps, signs, grids, unseen)
            if step is None:
                break
            seen |= around(output) ^ around(output.next)
            output = output.next
            if output.op == "call_module":
                passed.append(every[calls.module(output)])
            if step:
                steps.append(step)
            if step == CODES:
                break
        if steps:
            prefix = f"{within}." if within else ""
            found.append((layer, tuple(steps), (*passed, *(prefix + name for name in sorted(seen))), within))
    return found


def _step(calls: Calls, output: fx.Node, steps: list[str], signs: bool, grids: Grids, unseen: set[nn.Module]) -> str | None:
    """What the node behind `output` does with it: a step, "" for nothing at all, None for what ends the chain."""
    after = output.next
    if len(output.users) != 1 or after not in output.users:
        return None
    if after.op == "call_module":
        module = calls.module(after)
        if after.args != (output,) or after.kwargs or module not in unseen:
            return None
        if type(module) is nn.Identity:
            return ""
        if not signs and plain_class(type(module)) in CLIPS and CLIP not in steps:
            return CLIP
        return CODES if not signs and calls.alone(after) in grids and issubclass(grids[module] or SignGrid, StepGrid) else None
    if after.op == "call_function" and after.target in (operator.add, operator.iadd) and not steps:
        first, second = after.args
        both = isinstance(first, fx.Node) and isinstance(second, fx.Node)
        return ADD if both and (after.target is operator.add or first is output) else None
    clips = not signs and after.op in ("call_function", "call_method") and after.target in _CLIP_CALLS and CLIP not in steps
    return CLIP if clips and after.args[0] is output else None


def _behind_stem(calls: Calls, output: fx.Node, steps: list[str], unseen: set[nn.Module]) -> str | None:
    """As _step, behind a first convolution that stays float."""
    after = output.next
    if len(output.users) != 1 or after not in output.users or after.args[:1] != (output,):
        return None
    if after.op == "call_module":
        module = calls.module(after)
        kind = plain_class(type(module))
        if module not in unseen or len(after.args) > 1 or after.kwargs:
            return None
        if kind is nn.Identity:
            return ""
        pools = kind is nn.MaxPool2d and goes_with_stem(module)
        step = NORM if kind is nn.BatchNorm2d else CLIP if kind in CLIPS else POOL if pools else None
    else:
        step = CLIP if after.op in ("call_function", "call_method") and after.target in _CLIP_CALLS else None
    behind = _BEHIND_STEMS[_BEHIND_STEMS.index(steps[-1]) + 1 :] if steps else _BEHIND_STEMS
    return step if step in behind else None
