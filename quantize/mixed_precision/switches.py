"""A copy of a model in which any layer can be switched to any choice of bits, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..packed.plain import shell, without_compression
from ..weight.config import WeightConfig
from ..weight.lsq import ActivationQuantizer, Observer
from ..weight.prepare import channel_axis, quantizes_input, tensor_names
from ..weight.quantizer import make_activation_quantizer, make_quantizer
from .replay import Call, Replay, first_calls


class Switch(nn.Module):
    """A parametrization of a weight: the weight itself, or what the chosen one of `quantizers` makes of it."""

    def __init__(self, quantizers: Sequence[nn.Module | None]):
        super().__init__()
        self.quantizers = quantizers  # in a tuple: no submodules
        self.chosen: int | None = None
        self.value: Tensor | None = None

    def choose(self, choice: int | None) -> None:
        """An index into the quantizers, or None."""
        self.chosen, self.value = choice, None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in force."""
        quantizer = None if self.chosen is None else self.quantizers[self.chosen]
        if quantizer is None:
            return weight
        if self.value is None:
            self.value = quantizer(weight)
        return self.value


class InputSwitch:
    """A forward pre-hook: the layer's input as it is, or as the chosen one of `quantizers` rounds it; observed, if there is an observer."""

    def __init__(self, name: str, quantizers: Sequence[nn.Module | None]):
        self.name, self.quantizers = name, quantizers
        self.chosen: int | None = None
        self.observer: Observer | None = None

    def choose(self, choice: int | None) -> None:
        """An index into the quantizers, or None."""
        self.chosen = choice

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.observer is not None:
            self._observe(args[0] if args else kwargs["input"])
        quantizer = None if self.chosen is None else self.quantizers[self.chosen]
        if quantizer is None:
            return args, kwargs
        if args:
            return (quantizer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": quantizer(kwargs["input"])}

    def _observe(self, input: Tensor) -> None:
        try:
            self.observer.observe(input)
        except ValueError as error:
            raise ValueError(f"measure_sensitivity: model's activations must be finite; of layer {self.name!r}: {error}") from error


class SwitchedModel:
    """`model` in evaluation mode, its large parameters shared, with a row of `configs` to choose from for each of `groups` of layers.

    Nothing of `model` itself changes. A config of None leaves the layer in full precision.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]], configs: Sequence[WeightConfig | None]):
        self.model = shell(model, "measure_sensitivity").eval()
        without_compression(self.model)
        self.replay = Replay(self.model)  # before there are parametrizations, which need no record
        self.groups = [[self.model.get_submodule(name) for name in names] for names in groups]
        self.around = [[_inside_out(self.model, name) for name in names] for names in groups]
        self.switches = [
            [switch for name in names for switch in _switches(self.model.get_submodule(name), name, configs)] for names in groups
        ]

    @contextlib.contextmanager
    def chosen(self, layer: int, choice: int | None) -> Iterator[None]:
        """Layer number `layer` at choice number `choice` while inside."""
        try:
            for switch in self.switches[layer]:
                switch.choose(choice)
            yield
        finally:
            for switch in self.switches[layer]:
                switch.choose(None)

    def assign(self, choices: Sequence[int | None]) -> None:
        """A choice for every layer, until the next call."""
        for switches, choice in zip(self.switches, choices, strict=True):
            for switch in switches:
                switch.choose(choice)

    def starts(self, record: Call) -> list[int]:
        """When each group's first layer was called, or what holds it where nothing calls it (attention's output projections)."""
        first = first_calls(record)
        return [min(next((first[m] for m in chain if m in first), 0) for chain in chains) for chains in self.around]

    def calibrate(self, batches, run) -> None:
        """Sets all learned steps of inputs from `batches`; `run(inputs)` runs the model."""
        inputs = [s for switches in self.switches for s in switches if isinstance(s, InputSwitch)]
        inputs = [s for s in inputs if any(isinstance(q, ActivationQuantizer) for q in s.quantizers)]
        if not inputs:
            return
        for switch in inputs:
            switch.observer = Observer()
        for _ in range(2):
            for batch in batches:
                run(batch)
            for switch in inputs:
                switch.observer.advance()
        for switch in inputs:
            for quantizer in switch.quantizers:
                if isinstance(quantizer, ActivationQuantizer) and switch.observer.reached:
                    quantizer.start(switch.observer, "mse")
            switch.observer = None


def _switches(module: nn.Module, name: str, configs: Sequence[WeightConfig | None]) -> Iterator[Switch | InputSwitch]:
    for tensor in tensor_names(module):
        weight = getattr(module, tensor)
        quantizers = (config and make_quantizer(config, weight, channel_axis(module)).eval() for config in configs)
        switch = Switch(tuple(quantizers))
        if tensor in module._parameters:  # parametrize writes a parameter onto itself, which graphs of the model's must not see
            setattr(module, tensor, nn.Parameter(weight.data, requires_grad=False))
        parametrize.register_parametrization(module, tensor, switch, unsafe=True)
        yield switch
    if quantizes_input(module) and any(config and config.activation_bits is not None for config in configs):
        device = next(module.parameters()).device
        switch = InputSwitch(
            name,
            tuple(
                make_activation_quantizer(config, device).eval() if config and config.activation_bits is not None else None
                for config in configs
            ),
        )
        module.register_forward_pre_hook(switch, with_kwargs=True)
        yield switch


def _inside_out(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
