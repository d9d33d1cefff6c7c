"""Residual sums: `layer(x) + shortcut` in one pass over the layer's output.

Where a trace shows that the very next thing done with a binary convolution's output is a sum, the layer does not compute it but hands on a
Pending (pending.py), and the sum computes both. The same float32 roundings in the same order, so the same result.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from .grid import SignGrid
from .modules import PackedConv2d
from .plain import shell
from .trace import Calls, collected, unwatched


@torch.no_grad()
def find_sums(model: nn.Module) -> None:
    """Marks the binary convolutions of `model`, whose outputs go straight into a sum."""
    binary = {name for name, m in model.named_modules() if isinstance(m, PackedConv2d) and isinstance(m.grid, SignGrid)}
    if not binary:
        return
    copied = shell(model).eval()
    names = {copied.get_submodule(name): name for name in binary}
    seen_once = unwatched(copied, set(copied.modules()))
    for layer in collected(copied, set(names), lambda root, graph: _summed(root, graph, seen_once.intersection(names), seen_once)):
        vars(model.get_submodule(names[layer]))["_summed"] = True


def _summed(root: nn.Module, graph: fx.Graph, layers: set[nn.Module], unseen: set[nn.Module]) -> list[nn.Module]:
    """Of these layers. Nothing may come between: the input might change."""
    calls, found = Calls(root, graph), []
    for node in calls.nodes:
        layer, output = calls.link(node), node
        if layer not in layers:
            continue
        while isinstance(folded := calls.link(output.next), nn.Identity) and folded in unseen and output.next.args[0] is output:
            output = output.next  # a batch norm that is in the layer
        add = output.next
        if len(output.users) == 1 and add in output.users and add.op == "call_function" and add.target in (operator.add, operator.iadd):
            first, second = add.args
            if isinstance(first, fx.Node) and isinstance(second, fx.Node) and (add.target is operator.add or first is output):
                found.append(layer)
    return found
