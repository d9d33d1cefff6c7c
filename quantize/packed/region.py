"""Where what a layer hands on is understood: inside the forward of the module whose trace has shown what comes after it."""

from __future__ import annotations

import torch
from torch import nn

from .. import _C
from ..hooks import add_hook, add_pre_hook


class Enter:
    """Forward pre-hook of such a module."""

    def __init__(self, region: _C.Region):
        self.region = region

    def __call__(self, module: nn.Module, args) -> None:
        if not torch.compiler.is_compiling():
            self.region.enter()


class Leave:
    """The forward hook that ends it, also when the forward raises an Exception."""

    def __init__(self, region: _C.Region):
        self.region = region

    def __call__(self, module: nn.Module, args, output) -> None:
        if not torch.compiler.is_compiling():
            self.region.leave()


def region_of(root: nn.Module) -> _C.Region:
    """The region that lasts as long as a call of `root`: the same each time."""
    for hook in root._forward_pre_hooks.values():
        if isinstance(hook, Enter):
            return hook.region
    region = _C.Region()
    add_pre_hook(root, Enter(region))
    add_hook(root, Leave(region), always_call=True)
    return region
