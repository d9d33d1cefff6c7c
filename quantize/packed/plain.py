"""Models as their definition has them: without the classes and hooks that QModule and parametrizations put in."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..activation.intercept import forget_calls_of
from ..activation.module import COUNTERPARTS
from ..checks import check_module
from ..copies import copy_of
from .clips import CLIPS
from .modules import PackedLayer
from .pools import PackedMaxPool2d
from .stems import PackedBatchNorm2d, PackedStemConv2d

_plain_of = {cls: plain for plain, cls in COUNTERPARTS.items()}


def is_parametrized_class(cls: type) -> bool:
    """Whether parametrize made `cls`, to put a property over a parameter."""
    return cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized")


def plain_class(cls: type, keep_parametrized: bool = False) -> type:
    """The class in the model's definition, of compressed layers torch.nn's."""
    if issubclass(cls, (PackedLayer, PackedMaxPool2d, PackedStemConv2d, PackedBatchNorm2d, *CLIPS.values())):
        return cls.plain
    if "_owns_config" in vars(cls):  # QModule's, made at run time
        return plain_class(cls._converted_from, keep_parametrized)
    if is_parametrized_class(cls):
        base = plain_class(cls.__bases__[0], keep_parametrized)
        if not keep_parametrized:
            return base
        if base is cls.__bases__[0]:
            return cls
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        return type(f"Parametrized{base.__name__}", (base,), own)
    return _plain_of.get(cls, cls)


def kind_of(module: nn.Module) -> str:
    """The name of its class in the model's definition."""
    return plain_class(type(module)).__name__


def forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody put another forward into this one object."""
    return "forward" in vars(module)


def without_compression(model: nn.Module) -> None:
    """Takes out, in place, what compressed training put in: classes, hooks, state. Parametrizations stay."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            continue
        before, after = type(module), plain_class(type(module), keep_parametrized=True)
        if before is not after:
            module.__class__ = after
            for name in ("_control", "_state", "_explicit_config"):
                vars(module).pop(name, None)
            if any(cls in _plain_of for cls in before.__mro__):  # QModule alone leaves `config` to the model
                vars(module).pop("config", None)
        forget_calls_of(module)


def shell(model: nn.Module, who: str) -> nn.Module:
    """A copy to run or trace: modules, buffers and small parameters its own, the large parameters the model's."""
    return copy_of(model, who, {id(p): p for p in model.parameters() if p.dim() > 1})


def refuse_wrappers(model: nn.Module, who: str) -> None:
    """TypeError for what is no module, or hides one."""
    check_module(who, model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{who}: model must not be a ScriptModule, whose layers cannot be replaced")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"{who}: model must be the module itself, not its {type(model).__name__}; pass model.module")
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"{who}: model must be the module itself, not what torch.compile made of it; pass model._orig_mod")
