"""Layers whose output is not always a float tensor: it may wait for what comes after it (pending.py), or be the next layer's bits."""

from __future__ import annotations

from torch import nn

from .. import _C
from .region import Enter, Leave

_EVERYWHERE = (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)  # of all modules


class Observers:
    """Whether there are hooks: true while one of these dictionaries has any but regions'. torch.export replaces what modules hold by
    copies, as far as it knows it, and these dictionaries must stay the modules' own."""

    __slots__ = ("hooks",)

    def __init__(self, *hooks: dict):
        self.hooks = hooks

    def __bool__(self):
        return any(self.hooks) and any(not isinstance(hook, (Enter, Leave)) for own in self.hooks for hook in own.values())


class Waiting(nn.Module):
    """Mixin of such a layer."""

    placed = ""  # its name when the model was converted
    _observers: Observers | None = None  # watch()
    _steps: tuple[str, ...] = ()  # what comes after it and is computed with it: chains.py
    _region: _C.Region | None = None  # in which it is called for that

    def watch(self, *others: nn.Module) -> None:
        """While one of these modules has a hook, or the layer itself, nothing but floats is handed on."""
        hooks = [found for other in others for found in (other._forward_pre_hooks, other._forward_hooks)]
        vars(self)["_observers"] = Observers(self._forward_hooks, *hooks)

    def watched(self) -> bool:
        """Whether hooks would see what the layer hands on, where that is not always a float tensor."""
        return bool(self._observers) or any(_EVERYWHERE)

    def awaits(self) -> bool:
        """Whether what comes behind the layer is to be computed with it."""
        return bool(self._steps) and not self.watched() and self._region.is_entered()
