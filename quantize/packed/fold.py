"""Which batch norms can go into the layer before them.

The model's forward is traced symbolically (torch.fx). Modules whose own forward cannot be traced are taken as they are, and their children
traced by themselves. A pair is folded only if every trace says the same: one call each, and nobody but the batch norm sees what the layer
computes or reads its tensors.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter

import torch
from torch import Tensor, fx, nn

from ..weight.prepare import quantize_input_of
from .plain import forward_of_its_own, shell

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]):
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def find_pairs(model: nn.Module, names: set[str]) -> list[tuple[str, str]]:
    """(layer, batch norm) by module name, for layers among `names`: those whose weight is going to be packed.

    The model must be in eval mode, without compressed layers' classes. Nothing of it changes.
    """
    copied = shell(model)
    candidates = {copied.get_submodule(name): name for name in names}
    norms = {m: name for name, m in copied.named_modules() if type(m) in BATCH_NORMS}
    uses = Counter(id(m) for _, m in copied.named_modules(remove_duplicate=False))
    leaves = {m for m in copied.modules() if m is not copied and {*candidates, *norms}.isdisjoint(m.modules())} | {*candidates, *norms}
    allowed = {m for m in (*candidates, *norms) if uses[id(m)] == 1 and not _watched(m)}
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        pairs, _ = _pairs(copied, leaves)
    return [
        (candidates[layer], norms[norm]) for layer, norm in pairs if layer in allowed & set(candidates) and norm in allowed & set(norms)
    ]


def _watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, see what the module takes or gives. The activation quantizer's hook does not count."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook is not quantize_input_of]
    others = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return bool(hooks) or any(others) or forward_of_its_own(module)


def _pairs(module: nn.Module, leaves: set[nn.Module]) -> tuple[list[tuple[nn.Module, nn.Module]], set[nn.Module]]:
    """The pairs inside `module`, and the modules inside it, or itself, whose own forward cannot be traced."""
    if module in leaves:
        return [], set()
    found = _traced(module, leaves)
    if found is not None:
        return found, set()
    inside = {child: _pairs(child, leaves) for child in module.children()}
    opaque = set().union(*(opaque for _, opaque in inside.values()))
    found = _traced(module, leaves | opaque) if opaque else None  # `module` calls what cannot be traced
    if found is None:
        return [pair for pairs, _ in inside.values() for pair in pairs], {module}
    return found + [pair for child in opaque for grandchild in child.children() for pair in _pairs(grandchild, leaves)[0]], opaque


def _traced(root: nn.Module, leaves: set[nn.Module]) -> list[tuple[nn.Module, nn.Module]] | None:
    """The pairs that all traces of `root` agree on; None where it cannot be traced."""
    try:
        optional = {
            name: p.default for name, p in inspect.signature(root.forward).parameters.items() if p.default is not inspect.Parameter.empty
        }
        results = []
        for defaults in ({}, optional) if optional else ({},):  # "if mask is not None" takes the one branch or the other
            results.append(_graph_pairs(root, _Tracer(leaves).trace(root, defaults or None)))
    except Exception:  # data-dependent control flow, calls that take no proxies: whatever a forward may do
        return None
    return [pair for pair in results[0] if all(pair in result for result in results)]


def _graph_pairs(root: nn.Module, graph: fx.Graph) -> list[tuple[nn.Module, nn.Module]]:
    calls = Counter(root.get_submodule(node.target) for node in graph.nodes if node.op == "call_module")
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    read |= {node.target for node in graph.nodes if node.op == "call_module" and ".parametrizations." in f".{node.target}"}
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            continue
        names = (node.target, user.target)
        layer, norm = (root.get_submodule(name) for name in names)
        if calls[layer] == calls[norm] == 1 and not any(target.startswith(f"{name}.") for target in read for name in names):
            pairs.append((layer, norm))
    return pairs


def scale_and_shift(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor] | None:
    """What the batch norm does to a channel in evaluation, float64: x * scale + shift. None where it cannot be folded."""
    tensors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if norm.running_mean is None or norm.num_features != channels or any(t is not None and t.dtype != torch.float32 for t in tensors):
        return None
    weight, bias, mean, var = (None if t is None else t.detach().double() for t in tensors)
    scale = (var + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return (scale, shift) if scale.isfinite().all() and shift.isfinite().all() else None
