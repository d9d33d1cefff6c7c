"""What all compressed layers have in common."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..activation.config import ActivationConfig
from ..activation.state import LayerState, is_disabled
from ..inputs import names_refusals


def forward_of_layer(forward):
    """Decorator of a compressed layer's forward. An input that does not fit is named when PyTorch has refused it. What the forward calls
    goes straight to PyTorch: the interceptor of functional calls has nothing to do in there, but would be asked at every attribute of every
    tensor, some twenty times a layer."""

    named = names_refusals(forward)

    @functools.wraps(forward)
    def run(self, input, *args, **kwargs):
        depth = 0 if torch.compiler.is_compiling() else torch._C._len_torch_function_stack()
        if not depth or not getattr(torch._C._get_function_stack_at(depth - 1), "intercepts", False):
            return named(self, input, *args, **kwargs)
        mode = torch._C._pop_torch_function_stack()
        try:
            return named(self, input, *args, **kwargs)
        finally:
            torch._C._push_on_torch_function_stack(mode)

    return run


class CompressedLayer(nn.Module):
    """Mixin over an nn layer: its own signature plus ``config=``.

    Subclasses name the nn class they stand for as their second base and override ``forward``. A plain layer becomes a compressed one by
    a change of class, so that parameters, buffers, hooks and every other attribute stay what they are.
    """

    plain: type[nn.Module]
    lossy = False  # whether the layer packs values (convolution, linear, batch norm) rather than exact masks or shapes

    def __init__(self, *args, config: ActivationConfig | None = None, **kwargs):
        if config is not None and not isinstance(config, ActivationConfig):
            raise TypeError(f"{type(self).__name__}: config must be an ActivationConfig; got {config!r}")
        super().__init__(*args, **kwargs)
        self.attach(config or ActivationConfig(), "", explicit=config is not None)

    def attach(self, config: ActivationConfig, name: str, explicit: bool = False) -> None:
        """Sets the config in force and the name that reports use. `explicit`: given by hand, which a QModule's config leaves alone."""
        self.config, self._explicit_config = config, explicit
        self._state = LayerState(name, config)

    @property
    def compresses(self) -> bool:
        """Whether compression is on. In evaluation without gradients the functional layer does nothing anyway."""
        return self.config.enabled and not is_disabled()

    @classmethod
    def convert(cls, module: nn.Module, config: ActivationConfig, name: str) -> None:
        """Turns a plain layer into a compressed one, in place."""
        module.__class__ = cls
        module.attach(config, name)
