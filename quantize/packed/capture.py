"""A model's forward as a list of ops that C++ calls one after another: at batch 1 Python takes longer than small layers do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _C
from ..checks import check_module
from .trial import compare, copy_of, other_values

MOST = 16  # captures that are kept, of which the oldest goes first
_WITHOUT_MODE = (nn.ModuleDict, nn.ModuleList, ParametrizationList)  # parametrize makes them in training mode in any model
OURS = __name__.partition(".")[0]
_OF_ALL_MODULES = (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)


def capture(model: nn.Module) -> Captured:
    """`model` as a function that runs its forward without Python: what a graph of ops is in other runtimes, for inference.

    The first call with inputs of some shapes runs the forward and records the ops that it calls, packed layers' with all that they compute
    together; later ones call those ops again. Nothing else happens in them: no Python of a forward, no gradients. Outputs are the model's
    own. A changed parameter, buffer or submodule, or ``model.to``, is noticed, and the next call captures anew; another attribute of a
    layer is not. A capture is tried on other values first: a forward that depends on them in another way than by its ops is an error.

    Args:
        model: any module in evaluation mode, from tensors to tensors, in containers too. Its parameters and buffers are used where they
            are; nothing is copied.

    Returns:
        A function of the model's arguments, with the model as `.model`. It keeps up to 16 captures, by shapes, dtypes, memory formats,
        devices, autocast and the values of arguments that are no tensors. Threads may share it. Where that cannot be (hooks, scripted
        modules, sparse inputs, ``torch.compile``, ``torch.export``, ``torch.func``), a call is one of the model.

    Raises:
        TypeError: `model` is no module; at the call: its output has something beside tensors, numbers, strings and containers of them.
        ValueError: at the call: the model is in training mode; its forward reads a tensor's values (``.item()``, ``if x.sum() > 0``), or
            has sizes that depend on them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
        >>> packed = quantize.convert(quantize.prepare(model, quantize.Uniform(8)))
        >>> fast, x = quantize.capture(packed), torch.randn(1, 3, 32, 32)
        >>> torch.equal(fast(x), packed(x))
        True
    """
    check_module("capture", model)
    return Captured(model)


class _Capture(NamedTuple):
    watch: _C.Watch
    tape: _C.Tape
    output: Callable[[list[Tensor]], Any]


class Captured:
    """What :func:`capture` returns."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.__setstate__(vars(self))

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self._plain(args, kwargs)
        if not kwargs and all(type(x) is Tensor for x in args):
            tensors, form = args, len(args)
        else:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            form = (structure, *((type(leaf), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves))
        try:
            captures = self._captures.get(form, ())
        except TypeError:  # an argument without a hash, whose values nobody could compare
            return self._plain(args, kwargs)
        for found in () if self.model.training else captures:
            if found.watch.unchanged() and (outputs := found.tape(tensors)) is not None:
                return found.output(outputs)
        return self._capture(form, args, kwargs)

    @torch.no_grad()
    def _plain(self, args: tuple, kwargs: dict):
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def _capture(self, form, args: tuple, kwargs: dict):
        modules = list(self.model.modules())
        if any(module.training and not isinstance(module, _WITHOUT_MODE) for module in modules):
            raise ValueError("capture: model must be in evaluation mode; got one in training mode")
        leaves, structure = pytree.tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        strange = any(not _is_plain(x) for x in inputs)
        strange |= any(isinstance(module, torch.jit.ScriptModule) for module in modules)  # which does not show what it holds
        traced = torch._C._get_tracing_state() is not None or _C.in_transform()
        if strange or traced or _has_hooks(self.model) or any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return self.model(*args, **kwargs)

        def call(tensors: list[Tensor]):
            left = iter(tensors)
            args, kwargs = pytree.tree_unflatten([next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
            return self.model(*args, **kwargs)

        copies, others = list(map(copy_of, inputs)), other_values(inputs)  # before a forward changes its inputs
        output = self.model(*args, **kwargs)  # what packed layers make at their first use they make now
        made = _record(self.model, call, copies)
        compare(call, lambda tensors: made.output(made.tape(tensors)), others)
        with self._lock:
            self._keep(form, made)
        return output

    def _keep(self, form, made: _Capture) -> None:
        self._captures[form] = [found for found in self._captures.pop(form, ()) if found.watch.unchanged()] + [made]
        while sum(map(len, self._captures.values())) > MOST:
            oldest = next(iter(self._captures))
            self._captures[oldest] = self._captures[oldest][1:]
            if not self._captures[oldest]:
                del self._captures[oldest]

    def __repr__(self) -> str:
        return f"Captured({self.model!r})"

    def __getstate__(self) -> dict:
        """The model; a copy captures for itself."""
        return {"model": self.model}

    def __setstate__(self, state: dict):
        self.model, self._captures, self._lock = state["model"], OrderedDict(), threading.Lock()


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: _C.Tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            raise ValueError(f"capture: model must call ops, and no others that take functions; it calls {func}")
        result = func(*args, **kwargs)
        reads = any(not isinstance(x, (Tensor, type(None))) for x in pytree.tree_leaves(result)) or _sizes_by_values(func, args)
        if reads and self.tape.varies([*args, *kwargs.values()]):
            raise ValueError(
                f"capture: model must compute the same for all values of its inputs; its forward reads values, or has sizes that depend on "
                f"them: {func.name()}"
            )
        if func is torch.ops.aten.lift_fresh.default:  # of a constant, which must stay one
            func, args = torch.ops.aten.clone.default, (args[0].clone(),)
        self.tape.add(func._schema.name, func._schema.overload_name, args, kwargs, result, torch.Tag.nondeterministic_seeded in func.tags)
        return result


def _sizes_by_values(func: torch._ops.OpOverload, args: tuple) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _record(model: nn.Module, call: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> _Capture:
    tape = _C.Tape(inputs)
    with tape, _Recorder(tape):
        output = call(inputs)
    leaves, structure = pytree.tree_flatten(output)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, str, type(None))):
            raise TypeError(f"capture: model must return tensors, numbers and strings in containers; got {type(leaf).__name__}")
    tape.finish([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    if isinstance(output, Tensor):
        return _Capture(_watch(model), tape, lambda outputs: outputs[0])

    def whole(outputs: list[Tensor]):
        left = iter(outputs)
        return pytree.tree_unflatten([next(left) if isinstance(leaf, Tensor) else leaf for leaf in constants], structure)

    constants = [Tensor() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _Capture(_watch(model), tape, whole)


def _watch(model: nn.Module) -> _C.Watch:
    """Over all that the captured ops were chosen by, but the mode of `model` itself: what is watched is held, and the model may hold the
    capture."""
    entries, sizes = [], list(_OF_ALL_MODULES)
    for module in model.modules():
        if module is not model:
            entries.append((vars(module), "training", module.training))
        own = (module._parameters, module._buffers, module._modules, module._forward_pre_hooks, module._forward_hooks)
        entries += [(dictionary, key, value) for dictionary in own for key, value in dictionary.items()]
        sizes += own
    return _C.Watch(entries, sizes)


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is dense numbers, with values."""
    return type(x) is Tensor and x.layout == torch.strided and not (x.is_conj() or x.is_neg() or x.is_meta)


def _has_hooks(model: nn.Module) -> bool:
    """Beside ours, which do nothing but call ops."""
    hooks = (hook for module in model.modules() for own in (module._forward_pre_hooks, module._forward_hooks) for hook in own.values())
    return any(_OF_ALL_MODULES) or any(getattr(hook, "__module__", "").partition(".")[0] != OURS for hook in hooks)
