"""Hooks that this package put into modules, taken out again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def remove_hooks(module: nn.Module, ours: Callable[[Callable], bool]) -> None:
    """Takes the forward hooks and forward pre-hooks that are `ours` out of `module`, wherever they were registered. The handles that
    register_forward_hook returned would do it, but not in copies of the module."""
    notes = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if ours(hook)]:  # keys are of all modules' hooks: no two are the same
            for table in (hooks, *notes):
                table.pop(key, None)
