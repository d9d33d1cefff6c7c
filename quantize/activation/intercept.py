"""Functional calls in a QModule's forward, compressed as the layers are.

A model may call ``F.relu`` where another has ``nn.ReLU``, and layers that subclass nn's (timm's ``BatchNormAct2d``, padded or
weight-standardised convolutions) keep a forward of their own. A TorchFunctionMode around the forward sees the calls that all of these make.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..hooks import add_hook, add_pre_hook, remove_hooks
from .config import ActivationConfig
from .handlers import HANDLERS
from .state import LayerState, hold_op, under_checkpoint

# Layers whose calls are attributed to them by name: those whose calls handlers.py compresses. LOSSY: those that pack values.
LOSSY = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.SiLU,
    nn.Hardswish,
    nn.Mish,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.ELU,
    nn.Softplus,
    nn.PReLU,
)
SUPPORTED = (
    *LOSSY,
    nn.ReLU,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Dropout,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)


class _Local(threading.local):
    def __init__(self):
        self.stack: list[Interceptor] = []


_local = _Local()


class Enter:
    """Forward pre-hook of a layer that keeps a forward of its own: the calls it makes are under its name and config."""

    def __init__(self, state: LayerState | None):
        self.state = state

    def __call__(self, module, args):
        if not torch.compiler.is_compiling() and _local.stack:
            _local.stack[-1].layers.append(self.state)


class Leave:
    """The forward hook that ends :class:`Enter`'s reach, also when the layer raises."""

    def __call__(self, module, args, output):
        if not torch.compiler.is_compiling() and _local.stack and _local.stack[-1].layers:
            _local.stack[-1].layers.pop()


def name_calls_of(module: nn.Module, state: LayerState | None) -> None:
    """Puts the calls that `module` makes under `state`; None: leaves them alone."""
    add_pre_hook(module, Enter(state))
    add_hook(module, Leave(), always_call=True)


def forget_calls_of(module: nn.Module) -> None:
    """Undoes :func:`name_calls_of`, however often it was called."""
    remove_hooks(module, lambda hook: isinstance(hook, (Enter, Leave)))


def state_of(module: nn.Module) -> LayerState | None:
    """What stands behind a layer's own packed input, or behind the calls it makes."""
    own = vars(module).get("_state")
    entered = (hook.state for hook in module._forward_pre_hooks.values() if isinstance(hook, Enter))
    return own if isinstance(own, LayerState) else next(entered, None)


def keep_two_values(module: nn.Module) -> None:
    """What is kept of a layer's input is a bit an element where its activation quantizer leaves it two values."""
    quantizer, state = module._modules.get("activation_quantizer"), state_of(module)
    if state is not None and getattr(quantizer, "kind", None) is not None and quantizer.bits == 1:
        state.keep_two_values()


class Interceptor(TorchFunctionMode):
    """Active during one forward of a QModule. `default` is the config of calls outside any named layer, None for none."""

    intercepts = True  # what quantize/layers/base.py knows it by

    def __init__(self, default: ActivationConfig | None, states: dict[str, LayerState], owners: Callable[[], dict[int, str]]):
        super().__init__()
        self.default, self.states, self.owners = default, states, owners
        self.layers: list[LayerState | None] = []
        self.names: dict[int, str] | None = None
        self.anonymous = 0

    def __enter__(self):
        _local.stack.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _local.stack.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the model that is compiled by itself
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is None or not self.applies():
            return func(*args, **kwargs)
        hold_op(func.__name__)
        try:
            return handler(self, *args, **kwargs)
        finally:
            hold_op("")

    def applies(self) -> bool:
        """Not where the layer or the model's config says no, and not under activation checkpointing, whose second forward runs outside
        of this mode: both must save the same tensors, and the first's are dropped anyway."""
        if self.layers:
            if self.layers[-1] is None:
                return False
        elif self.default is None:
            return False
        return torch.is_grad_enabled() and not under_checkpoint()

    def state(self, weight: Tensor | None, op: str) -> LayerState:
        """The state of the layer that a call belongs to: the one whose forward is running, else the weight's owner, else by order."""
        if self.layers and self.layers[-1] is not None:
            return self.layers[-1]
        name = None
        if weight is not None:
            if self.names is None:
                self.names = self.owners()
            name = self.names.get(id(weight))
        if name is None:
            self.anonymous += 1
            name = f"{op}#{self.anonymous}"
        state = self.states.get(name)
        if state is None:
            state = self.states[name] = LayerState(name, self.default)
        return state
