"""Hooks that this package puts into modules, to stay there, and takes out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn


def add_hook(module: nn.Module, hook: Callable, with_kwargs: bool = False, always_call: bool = False) -> None:
    """As register_forward_hook, for a hook that copies and pickles of the module take along. It has a name where others have numbers:
    those are counted anew in each process, so that hooks registered there would take the places of what a pickle brought."""
    key = _free_key(module._forward_hooks, "hook", hook)
    module._forward_hooks[key] = hook
    if with_kwargs:
        module._forward_hooks_with_kwargs[key] = True
    if always_call:
        module._forward_hooks_always_called[key] = True


def add_pre_hook(module: nn.Module, hook: Callable, with_kwargs: bool = False) -> None:
    """As register_forward_pre_hook; see :func:`add_hook`."""
    key = _free_key(module._forward_pre_hooks, "pre_hook", hook)
    module._forward_pre_hooks[key] = hook
    if with_kwargs:
        module._forward_pre_hooks_with_kwargs[key] = True


def _free_key(taken: Mapping, kind: str, hook: Callable) -> str:
    key = f"quantize.{kind}.{getattr(hook, '__name__', type(hook).__name__)}"
    while key in taken:
        key += "+"
    return key


def remove_hooks(module: nn.Module, ours: Callable[[Callable], bool]) -> None:
    """Takes the forward hooks and forward pre-hooks that are `ours` out of `module`, wherever they were registered. The handles that
    register_forward_hook returned would do it, but not in copies of the module."""
    notes = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if ours(hook)]:  # no two of a module's hooks have the same key
            for table in (hooks, *notes):
                table.pop(key, None)
