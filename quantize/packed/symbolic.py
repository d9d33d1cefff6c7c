"""Converted models in symbolic traces (torch.fx), such as torchvision's feature extractors make."""

from __future__ import annotations

from torch import fx, nn


def as_node(module: nn.Module, *args) -> fx.Proxy:
    """The call of `module` as a node of its own: tracers look into every module that is not torch.nn's, and ours stand for those."""
    tracer = args[0].tracer
    name = tracer.path_of_module(module)
    if not name:
        raise TypeError(f"{type(module).__name__}: a packed layer cannot be traced symbolically by itself; trace a module around it")
    return tracer.create_proxy("call_module", name, args, {})
