"""What a model's forward does between its modules, by symbolic tracing (torch.fx).

Modules whose own forward cannot be traced are taken as they are, and their children traced by themselves. Only what every trace says is
believed.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import fx, nn

from ..weight.prepare import quantize_input_of
from .plain import forward_of_its_own
from .region import Enter, Leave

Collect = Callable[[nn.Module, fx.Graph], list[Hashable]]


_ONE_AT_A_TIME = threading.RLock()


class _Tracer(fx.Tracer):
    """What it replaces while it traces, nn.Module's __call__ and __getattr__, all threads see: others' calls go through as they came."""

    def __init__(self, leaves: set[nn.Module]):
        super().__init__()
        self.leaves = leaves
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)


def collected(model: nn.Module, wanted: set[nn.Module], collect: Collect) -> list:
    """What `collect(root, graph)` finds in the graphs of `model`, each of whose modules `wanted` is a node of its own.

    `model` in eval mode, without compressed layers' classes. Nothing of it changes.
    """
    leaves = {m for m in model.modules() if m is not model and wanted.isdisjoint(m.modules())} | wanted
    with _ONE_AT_A_TIME, torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        found, _ = _inside(model, leaves, collect)
    return found


def unwatched(model: nn.Module, modules: set[nn.Module]) -> set[nn.Module]:
    """Those of `modules` that are used in one place, and whose inputs and outputs nothing but the model's forward sees."""
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return {m for m in modules if uses[id(m)] == 1 and not _watched(m)}


def _watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, see what the module takes or gives. This package's own hooks do not look."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    looks = any(hook is not quantize_input_of and not isinstance(hook, (Enter, Leave)) for hook in hooks)
    return looks or any((module._backward_hooks, module._backward_pre_hooks)) or forward_of_its_own(module)


def containers(name: str) -> set[str]:
    """The modules around the one of that name, by name; without the model itself."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def hooked_around(model: nn.Module) -> dict[nn.Module, frozenset[str]]:
    """The containers around each module whose hooks see what goes in and out: only within the same ones can modules be merged."""
    hooked = [f"{name}." if name else "" for name, m in model.named_modules() if _watched(m)]
    return {m: frozenset(outer for outer in hooked if name.startswith(outer)) for name, m in model.named_modules()}


def _inside(module: nn.Module, leaves: set[nn.Module], collect: Collect) -> tuple[list, set[nn.Module]]:
    """What is found inside `module`, and the modules inside it, or itself, whose own forward cannot be traced."""
    if module in leaves:
        return [], set()
    found = _traced(module, leaves, collect)
    if found is not None:
        return found, set()
    inside = {child: _inside(child, leaves, collect) for child in module.children()}
    opaque = set().union(*(opaque for _, opaque in inside.values()))
    found = _traced(module, leaves | opaque, collect) if opaque else None  # `module` calls what cannot be traced
    if found is None:
        return [item for items, _ in inside.values() for item in items], {module}
    return found + [item for child in opaque for grandchild in child.children() for item in _inside(grandchild, leaves, collect)[0]], opaque


def _traced(root: nn.Module, leaves: set[nn.Module], collect: Collect) -> list | None:
    """What all traces of `root` agree on; None where it cannot be traced."""
    try:
        optional = {
            name: p.default for name, p in inspect.signature(root.forward).parameters.items() if p.default is not inspect.Parameter.empty
        }
        results = []
        for defaults in ({}, optional) if optional else ({},):  # "if mask is not None" takes the one branch or the other
            results.append(collect(root, _Tracer(leaves).trace(root, defaults or None)))
    except Exception:  # data-dependent control flow, calls that take no proxies: whatever a forward may do
        return None
    return [item for item in results[0] if all(item in result for result in results)]


class Calls:
    """The calls of modules in a graph."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root = root
        self.nodes = [node for node in graph.nodes if node.op == "call_module"]
        self._count = Counter(self.module(node) for node in self.nodes)
        self._read = {node.target for node in graph.nodes if node.op == "get_attr"}
        self._read |= {node.target for node in self.nodes if ".parametrizations." in f".{node.target}"}

    def module(self, node: fx.Node) -> nn.Module:
        """That is called."""
        return self.root.get_submodule(node.target)

    def alone(self, node) -> nn.Module | None:
        """The module that `node` calls; None where it does something else, or calls it again, or the forward reads its tensors."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self.module(node)
        read = any(target.startswith(f"{node.target}.") for target in self._read)
        return None if read or self._count[module] > 1 else module

    def link(self, node) -> nn.Module | None:
        """As :meth:`alone`, of modules that are called with one tensor and nothing else."""
        one = isinstance(node, fx.Node) and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        return self.alone(node) if one else None
