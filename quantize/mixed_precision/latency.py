"""How long each layer takes at each choice of bits, run by the packed kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import check_integer
from ..copies import copy_of
from ..packed.convert import convert
from ..packed.modules import PackedLayer
from ..packed.pending import Pending
from ..weight.lsq import ActivationQuantizer, Observer, alone
from ..weight.prepare import calibrate
from .arguments import check_float_model, check_inputs, check_weights
from .costs import prepared_at
from .replay import call
from .sensitivity import Sensitivity

WHO = "measure_latency"


@torch.no_grad()
def measure_latency(model: nn.Module, inputs, sensitivity: Sensitivity, repeats: int = 20) -> Tensor:
    """Times every layer at every choice of a sensitivity: the model is converted at each choice and run, all choices in turn.

    The table goes to :func:`quantize.allocate` as ``latency=``, with ``max_latency=`` in seconds. It holds for this machine, this batch
    size and PyTorch's number of threads; what runs between the layers is not in it, but for sums that a binary convolution takes into its
    own pass. Nothing of the model changes.

    Args:
        model: the float model that `sensitivity` was measured on.
        inputs: a batch, as measure_sensitivity takes it.
        sensitivity: whose layers, choices and configurations are timed.
        repeats: passes at each choice, after two that are not counted.

    Returns:
        float64 [L, K]: seconds, medians over the passes; of a group the sum over its modules. Zero for layers that are not called.

    Raises:
        TypeError, ValueError: naming the argument; a `sensitivity` of another model.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> sensitivity = quantize.measure_sensitivity(model, batches, [(2, 8), (8, 8)], progress=False)
        >>> latency = quantize.measure_latency(model, batches[0][0][:1], sensitivity)
        >>> allocation = quantize.allocate(sensitivity, latency=latency, max_latency=float(latency.sum(0).max()))
    """
    check_float_model(model, WHO)
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(f"{WHO}: sensitivity must be a Sensitivity; got {type(sensitivity).__name__}")
    check_integer(WHO, "repeats", repeats, 1)
    check_inputs(inputs, WHO, "inputs")
    sensitivity.check_model(model)
    names = [name for layer in sensitivity.layers for name in sensitivity.members[layer]]
    check_weights(model, names, WHO)
    timed = [_Timed(_converted(model, names, config, inputs), names) for config in sensitivity.configs]
    for number in range(repeats + 2):
        for one in timed:
            one.run(inputs, counted=number >= 2)
    rows = [[sum(one.median(name) for name in sensitivity.members[layer]) for one in timed] for layer in sensitivity.layers]
    return torch.tensor(rows, dtype=torch.float64)


def _converted(model: nn.Module, names: list[str], config, inputs) -> nn.Module:
    if config is None:
        return copy_of(model, WHO).eval()
    prepared = prepared_at(model, dict.fromkeys(names, config))
    quantizers = [module for module in prepared.modules() if isinstance(module, ActivationQuantizer)]
    if quantizers:
        with alone():
            calibrate(_Called(prepared), [(inputs,)])
    for quantizer in quantizers:
        if not quantizer.has_started():  # zeros came, or nothing: any grid takes as long
            quantizer.start(Observer(), "mse")
    return convert(prepared)


class _Called(nn.Module):
    """A model that takes a batch's inputs in whatever form."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return call(self.model, inputs)


class _Timed:
    """A model whose modules `names` are timed: by what stands in for their forward, as hooks would make layers hand on floats."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.model, self.seconds, self.spent, self._inner = model, defaultdict(list), defaultdict(float), 0.0
        self.cuda = any(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
        for name in names:
            module = model.get_submodule(name)
            module.forward = partial(self._timed, name, module.forward)
            if not isinstance(module, PackedLayer):  # keeps transformer layers off their fused path, which calls no modules
                module.register_forward_pre_hook(lambda module, args: None)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, name: str, forward: Callable, *args, **kwargs):
        outer, self._inner, began = self._inner, 0.0, self._now()
        output = forward(*args, **kwargs)
        taken = self._now() - began
        self.spent[name] += taken - self._inner
        self._inner = outer + taken
        if isinstance(output, Pending):  # computed by what comes after it: a layer's time is not that of the one before it
            return output.around(lambda call: partial(self._timed, name, call))
        return output

    def run(self, inputs, counted: bool) -> None:
        """One pass."""
        self.spent.clear()
        call(self.model, inputs)
        if counted:
            for name, seconds in self.spent.items():
                self.seconds[name].append(seconds)

    def median(self, name: str) -> float:
        """Seconds of all calls of the module in a pass."""
        found = sorted(self.seconds[name])
        return found[len(found) // 2] if found else 0.0
