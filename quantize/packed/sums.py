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
from .trace import Calls, collected, containers, unwatched


@torch.no_grad()
def find_sums(model: nn.Module) -> None:
    """Marks the binary convolutions of `model`, whose outputs go straight into a sum."""
    binary = {name for name, m in model.named_modules() if isinstance(m, PackedConv2d) and isinstance(m.grid, SignGrid)}
    if not binary:
        return
    copied = shell(model).eval()
    names = {copied.get_submodule(name): name for name in binary}
    seen_once = unwatched(copied, set(copied.modules()))
    every = {m: name for name, m in copied.named_modules()}
    found = collected(copied, set(names), lambda root, graph: _summed(root, graph, seen_once.intersection(names), seen_once))
    for layer, *between in found:
        packed = model.get_submodule(names[layer])
        vars(packed)["_summed"] = True
        packed.watch(*(model.get_submodule(every[m]) for m in between))


def _summed(root: nn.Module, graph: fx.Graph, layers: set[nn.Module], unseen: set[nn.Module]) -> list[tuple[nn.Module, ...]]:
    """Of these layers, each with the modules that see its output on its way. Nothing may come between: the input might change."""
    calls, found = Calls(root, graph), []
    for node in calls.nodes:
        layer, output, between = calls.link(node), node, []
        if layer not in layers:
            continue
        while isinstance(folded := calls.link(output.next), nn.Identity) and folded in unseen and output.next.args[0] is output:
            output = output.next  # a batch norm that is in the layer
            between.append(folded)
        add = output.next
        if len(output.users) == 1 and add in output.users and add.op == "call_function" and add.target in (operator.add, operator.iadd):
            first, second = add.args
            if isinstance(first, fx.Node) and isinstance(second, fx.Node) and (add.target is operator.add or first is output):
                left = containers(node.target) - set(add.meta.get("nn_module_stack", ()))
                found.append((layer, *between, *map(root.get_submodule, sorted(left))))
    return found
