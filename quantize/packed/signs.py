"""What stands before a sign and can go into its thresholds: a batch norm, a clip after it, a ReLU before it."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .fold import BATCH_NORMS
from .plain import shell
from .trace import Calls, collected, hooked_around, unwatched

# What gives no number below zero if it is given none: a ReLU before these is one before the sign.
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_POOLS += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POSITIVE = (*_POOLS, nn.Dropout, nn.Identity, nn.Flatten)
_POSITIVE_CALLS = {F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, torch.flatten}
_NEVER_NEGATIVE = {F.relu, F.relu6, torch.relu, torch.relu_, torch.sigmoid, F.sigmoid, "relu", "relu_", "sigmoid"}
# Whose output shares no memory with the input, and with the first input at most (a trace says "+" of "+=").
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, *BATCH_NORMS)
_SUMS = {operator.add, operator.iadd, torch.add}


class Path(NamedTuple):
    """Modules by name, from the input on, or empty: [source] [relu] norm [clip] layer. `source` is a layer that nothing else sees."""

    layer: str
    norm: str = ""
    clip: str = ""
    relu: str = ""
    source: str = ""
    constant: bool = False  # the input is never below zero: its sign says nothing
    root: str = ""  # the module whose trace says so

    @property
    def removed(self) -> tuple[str, ...]:
        """What the thresholds stand for, in the order of the calls."""
        return tuple(name for name in (self.relu, self.norm, self.clip) if name)


def find_paths(model: nn.Module, kinds: dict[str, str]) -> dict[str, Path]:
    """For layers whose input becomes one bit, by name: what is before it. `kinds`: "sign" or "unit" (grid.py).

    The model in eval mode, without compressed layers' classes. Nothing of it changes.
    """
    if not kinds:
        return {}
    copied = shell(model, "convert")
    layers = {copied.get_submodule(name): kind for name, kind in kinds.items()}
    norms = {m for m in copied.modules() if type(m) in BATCH_NORMS}
    names = {m: name for name, m in copied.named_modules()}
    every, around = unwatched(copied, set(copied.modules())), hooked_around(copied)
    single = {m: kind for m, kind in layers.items() if m in every}
    paths, wanted = {}, {*layers, *norms}
    for layer, *before, constant, root in collected(copied, wanted, lambda root, graph: _graph_paths(root, graph, single, every, around)):
        paths[names[layer]] = Path(names[layer], *(names.get(m, "") for m in before), constant, names[root])
    return paths


def _graph_paths(root: nn.Module, graph: fx.Graph, signs: dict[nn.Module, str], every: set[nn.Module], around: dict) -> list[tuple]:
    """(layer, norm, clip, relu, source, constant, root), None for what is not there."""
    calls, found = Calls(root, graph), []
    for node in calls.nodes:
        layer = calls.link(node)
        if layer not in signs:
            continue
        kinds = {m: kind for m, kind in signs.items() if around[m] == around[layer]}
        unseen = {m for m in every if around[m] == around[layer]}
        kind, above = kinds[layer], node.args[0]
        clip = calls.link(above)
        if clip in unseen and _clips(clip, kind) and all(kinds.get(calls.link(user)) == kind for user in above.users):
            above = above.args[0]
        else:
            clip = None
        norm = calls.link(above)
        if norm not in unseen or type(norm) not in BATCH_NORMS or not _only_signs(calls, above, clip, kind, kinds):
            if clip is None and kind == "sign" and _never_negative(calls, node):
                found.append((layer, None, None, None, None, True, root))
            continue
        single_consumer = len(above.users) == len(node.args[0].users) == 1
        above = above.args[0]
        relu = calls.link(above)
        if relu in unseen and type(relu) is nn.ReLU and len(above.users) == 1 and (not relu.inplace or _alone(calls, above.args[0])):
            above = above.args[0]
        else:
            relu = None
        source = calls.alone(above) if single_consumer and isinstance(above, fx.Node) and len(above.users) == 1 else None
        found.append((layer, norm, clip, relu, source if source in every else None, False, root))
    return found


def _alone(calls: Calls, node) -> bool:
    """Whether nobody but its one user sees the memory of `node`, so that what is done to it in place can be left out."""
    if not isinstance(node, fx.Node) or node.op in ("placeholder", "get_attr") or len(node.users) > 1:
        return False
    if node.op == "call_module" and isinstance(calls.module(node), _FRESH):
        return True
    return all(_alone(calls, other) for other in node.all_input_nodes[: 1 if node.target in _SUMS else None])


def _only_signs(calls: Calls, norm: fx.Node, clip: nn.Module | None, kind: str, kinds: dict[nn.Module, str]) -> bool:
    """Whether all that sees the norm's output is the clip, or such layers."""
    users = [calls.link(user) for user in norm.users]
    return all(user is clip if clip is not None else kinds.get(user) == kind for user in users)


def _clips(module: nn.Module, kind: str) -> bool:
    """Whether `module` leaves on its side of the threshold what is there."""
    if isinstance(module, nn.Hardtanh):  # and ReLU6
        return module.min_val < 0 <= module.max_val if kind == "sign" else module.min_val <= 0.5 < module.max_val
    return type(module) is nn.ReLU and kind == "unit"


def _never_negative(calls: Calls, layer: fx.Node) -> bool:
    """Whether the input of the call `layer` is. Not where something else sees it before, and may change it in place."""
    user, node = layer, layer.args[0]
    while isinstance(node, fx.Node):
        if not all(other is user or layer < other or _only_reads(calls, other) for other in node.users):
            return False
        if node.op == "call_module":
            module = calls.module(node)
            positive = isinstance(module, (nn.ReLU, nn.Sigmoid)) or (isinstance(module, nn.Hardtanh) and module.min_val >= 0)
            passes = isinstance(module, _POSITIVE)
        else:
            positive = node.op in ("call_function", "call_method") and node.target in _NEVER_NEGATIVE
            passes = node.op == "call_function" and node.target in _POSITIVE_CALLS
        if positive or not passes or not node.args:
            return positive
        user, node = node, node.args[0]
    return False


def _only_reads(calls: Calls, node: fx.Node) -> bool:
    """Whether the call `node` changes nothing and gives memory of its own: layers and pools. Of functions a trace does not say."""
    return node.op == "call_module" and isinstance(calls.module(node), (*_FRESH, *_POOLS))
