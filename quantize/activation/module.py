"""QModule: any model, converted in place to keep compressed activations."""

from __future__ import annotations

import contextlib
import re
import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from .. import layers as q
from ..checks import check_module
from ..layers.base import CompressedLayer
from ..patterns import resolve, unmatched
from .allocation import checked_state
from .config import ActivationConfig, check_config
from .control import Control
from .intercept import LOSSY, SUPPORTED, Interceptor, forget_calls_of, keep_two_values, name_calls_of, state_of
from .state import LayerState, Session, is_disabled, swap_session

OPS = (
    "conv|conv_transpose|linear|batch_norm|layer_norm|rms_norm|group_norm|instance_norm|attention|matmul|softmax|square|mul|"
    "silu|hardswish|mish|gelu|sigmoid|tanh|elu|softplus|cube|prelu"
)
CALL = re.compile(f"({OPS})#[1-9][0-9]*")  # as Interceptor.state has it
LARGEST_INDEX = 2**28  # of a sample: at 4 bytes for each one up to it, 1 GiB a layer

# Plain layer to compressed one, by exact type: a subclass may have a forward of its own, which it keeps.
COUNTERPARTS = {cls.plain: cls for name in q.__all__ if (cls := getattr(q, name)).plain is not None}


def controls_of(model: nn.Module) -> dict[str, Control]:
    """Of each QModule in `model`, by its name there: itself, or what DistributedDataParallel and other modules have inside them."""
    return {name: module._control for name, module in model.named_modules() if isinstance(module, QModule)}


DEFAULT = ActivationConfig()


class _Converting(type):
    """Makes ``QModule(model, config)`` convert instead of construct."""

    def __call__(cls, model: nn.Module, config=DEFAULT):
        return _convert(model, config)


class _Converted(_Converting):
    """Of converted models' classes: calling one makes a plain model, as ``type(self)(...)`` in nn.Sequential's slices wants."""

    def __call__(cls, *args, **kwargs):
        return cls._converted_from(*args, **kwargs)


class QModule(nn.Module, metaclass=_Converting):
    """Converts `model` in place so that activations saved for the backward pass are kept in `config.bits` bits, and returns it.

    The model stays what it is: same parameters, buffers, ties, hooks, submodules under their names, dtypes, devices, modes; its
    ``state_dict()`` has the plain model's keys and values and loads the plain model's checkpoints; an optimizer made before keeps
    working. Layers of torch.nn become their compressed counterparts; functional calls and layers with a forward of their own are
    compressed in the same way while the model's forward runs. In evaluation without gradients nothing changes at all.

    Under ``torch.compile`` layers of torch.nn are compressed; functional calls and layers with a forward of their own run as they are.
    Under activation checkpointing bits adapt per sample. Between layers, and by gradients, they adapt in blocks inside the model with
    ``use_reentrant=False``; in reentrant blocks, or with the whole model as the checkpointed function, nothing is learned.

    Args:
        model: any nn.Module.
        config: an :class:`ActivationConfig`, or a mapping from glob patterns over module names to one or to None (leaves the layer
            alone); the last match wins. Calls outside any layer go by the pattern that matches the empty name.

    Returns:
        The same object, whose class is now a subclass of QModule and of its own: with ``config``, :meth:`layer_bits`,
        :meth:`set_sample_indices`, :meth:`activation_state` and :meth:`load_activation_state`. A model that has an attribute ``config``
        already keeps it; ours is ``activation_config`` in any case. Copies and pickles are converted too, unless a ``__deepcopy__`` or
        ``__reduce__`` of the model's own makes them: ``type(self)(...)`` constructs a plain model.

    Raises:
        TypeError: `model` is no nn.Module or a compiled (ScriptModule) one, or `config` is of another type.
        RuntimeError, by a training step: it is being captured in a CUDA graph, every replay of which would draw the same noise.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        >>> model = quantize.QModule(model, quantize.ActivationConfig(bits=2, max_bits=2))
        >>> model(torch.randn(4, 3, 8, 8)).sum().backward()
        >>> model.layer_bits()
        {'0': 2.0, '1': 2.0, '4': 2.0}
    """

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled() or is_disabled() or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        self._check_indices(args, kwargs)
        with self._compressing():
            return super().__call__(*args, **kwargs)

    @contextlib.contextmanager
    def _compressing(self):
        control: Control = self._control
        control.begin_step()
        session = Session(control.indices, control.count_step())
        control.indices = None
        default = resolve(control.config, "")
        if default is not None and not default.enabled:
            default = None
        interceptor = Interceptor(default, control.functional, self._parameter_owners)
        # Not around DDP's own collectives: their thread would keep the mode, and let go of it under the GIL, for which DDP's destructor
        # does not wait without holding it.
        inner = _around(self.module, interceptor) if isinstance(self, nn.parallel.DistributedDataParallel) else interceptor
        previous = swap_session(session)
        try:
            with inner:
                yield
        finally:
            swap_session(previous)

    def _check_indices(self, args, kwargs) -> None:
        indices = self._control.indices
        if indices is None or getattr(self, "_is_replica", False):  # DataParallel's replicas get a part of the batch
            return
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            return
        samples = _sample_counts([*args, *kwargs.values()])
        if samples and indices.numel() not in samples:
            self._control.indices = None
            counts = " or ".join(map(str, dict.fromkeys(samples)))
            raise ValueError(f"set_sample_indices: indices must be one for each of the {counts} samples; got {indices.numel()}")

    def _parameter_owners(self) -> dict[int, str]:
        """Name of the module that holds a parameter or buffer, by identity."""
        owners = {}
        for name, module in self.named_modules():
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                owners.setdefault(id(tensor), name)
        return owners

    @property
    def activation_config(self):
        """The configuration given to QModule."""
        return self._control.config

    def set_sample_indices(self, indices: Tensor) -> None:
        """Tells which samples of the data set the next forward gets, for configs with ``use_gradient``.

        Args:
            indices: integer Tensor[N] of numbers from 0, one for each sample of the batch.

        Raises:
            TypeError: not an int64 or int32 tensor.
            ValueError: not one-dimensional or without values, or an index that is negative or 2^28 and more; and, by the next forward,
                where its input has another number of samples.
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
            found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"set_sample_indices: indices must be an int64 or int32 Tensor; got {found}")
        if indices.is_nested or indices.is_meta or indices.layout != torch.strided:
            found = "a nested one" if indices.is_nested else "one on meta" if indices.is_meta else indices.layout
            raise ValueError(f"set_sample_indices: indices must be a dense Tensor with values; got {found}")
        if indices.dim() != 1:
            raise ValueError(f"set_sample_indices: indices must be Tensor[N]; got shape {list(indices.shape)}")
        if indices.numel() and int(indices.min()) < 0:
            raise ValueError(f"set_sample_indices: indices must be numbers from 0; got {int(indices.min())}")
        if indices.numel() and int(indices.max()) >= LARGEST_INDEX:
            raise ValueError(
                f"set_sample_indices: indices must be below 2^28, as 4 bytes are kept for each one up to it; got {int(indices.max())}"
            )
        self._control.indices = indices.detach().to("cpu", torch.int64)

    def layer_bits(self) -> dict[str, float]:
        """Average bits per element in each lossy layer's last packing (before the first: as configured), by module name."""
        # By the layers' present states: another QModule around or beside this one may have converted them since.
        states = {n: state_of(m) for n, m in self.named_modules() if _is_lossy(m)}
        found = {name: state.used_bits() for name, state in states.items() if state is not None}
        return found | {state.name: state.used_bits() for state in self._control.functional.values()}

    def activation_state(self) -> dict:
        """What adaptive bits have learned, for a checkpoint: plain numbers and tensors by layer name."""
        return {state.name: state.learned() for state in self._finished_states()}

    def load_activation_state(self, state: dict) -> None:
        """Restores what adaptive bits had learned, of a model under this configuration or another.

        The configuration stays as it is: a layer has a loaded budget only where bits move between layers, and what is of layers that
        keep full precision here is left out.

        Args:
            state: what :meth:`activation_state` returned, or a part of it.

        Raises:
            TypeError, ValueError: naming layers that this model lacks, and what is no such state; the model is then as before.
        """
        loaded = checked_state(state)
        known, modules = {s.name: s for s in self._control.states()}, dict(self.named_modules())
        unknown = [name for name in loaded if name not in known and not _may_have_bits(name, modules.get(name))]
        if unknown:
            raise ValueError(f"load_activation_state: state has layers that the model lacks: {unknown[:5]}")
        default = resolve(self._control.config, "")
        for name, values in loaded.items():
            target = known.get(name)
            if target is None:  # of functional calls, or of a layer that is not compressed: that one must not have a share of the bits
                if default is None or not default.enabled or isinstance(modules.get(name), (CompressedLayer, *LOSSY)):
                    continue
                target = self._control.functional[name] = LayerState(name, default)
            vars(target).update(values)
            if not (target.config.adaptive and target.config.per_layer):
                target.budget = float(target.config.bits)

    def _finished_states(self) -> list[LayerState]:
        self._control.begin_step()  # so that the last step's figures are in
        self._control.receive(wait=True)
        return self._control.states()

    def __reduce_ex__(self, protocol):
        plain, owns_config = self._converted_from, self._owns_config
        if type(self) is not _class_for(plain, owns_config):  # what somebody has made of it since
            return super().__reduce_ex__(protocol)
        # The class was made at run time; pickle gets the original one and the fact that it was converted.
        if getattr(plain, "__getstate__", None) in (None, getattr(object, "__getstate__", None)):
            return _restore, (plain, owns_config), self.__dict__.copy()
        return _restore, (plain, owns_config, self._control), self.__getstate__()  # which may know nothing of what is ours


def _sample_counts(inputs: list) -> list[int]:
    """How many samples a forward's inputs may be: a list's length, sizes along dimension 0, and along 1 of what may be a sequence of
    tokens [T, N] or of vectors [T, N, E]."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    counts = [len(value) for value in inputs if isinstance(value, list)]
    counts += [len(t) for t in tensors if t.dim()]
    return counts + [t.shape[1] for t in tensors if t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())]


def _may_have_bits(name: str, module: nn.Module | None) -> bool:
    """Whether a state may be of a layer that is not known before it runs: calls go by who owns the weight, else by op and number."""
    if module is None:
        return CALL.fullmatch(name) is not None
    owns = any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))
    return owns or isinstance(module, (CompressedLayer, *LOSSY))


@contextlib.contextmanager
def _around(module: nn.Module, context):
    """Within it, `context` is entered for each call of `module`."""
    hooks = [
        module.register_forward_pre_hook(lambda *_: context.__enter__() and None, prepend=True),
        module.register_forward_hook(lambda *_: context.__exit__(None, None, None), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _convert(model: nn.Module, config) -> nn.Module:
    check_config(config, "QModule")
    check_module("QModule", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("QModule: model must not be a ScriptModule, whose layers cannot be replaced; convert it before scripting")
    for pattern in unmatched(config, [name for name, _ in model.named_modules()]):
        warnings.warn(f"QModule: config's pattern {pattern!r} matches no module of the model", stacklevel=3)
    control = Control(config)
    if isinstance(model, QModule):  # again, with another config: the hooks of the first time go
        for module in model.modules():
            forget_calls_of(module)
        converted = type(model)  # it may be a subclass by now: of parametrizations, of torch.distributed's
    else:
        converted = _class_for(type(model), owns_config=not hasattr(model, "config"))  # which may say that it cannot be
    for name, module in list(model.named_modules()):
        _convert_layer(module, name, config, control)
    model.__dict__["_control"] = control
    model.__class__ = converted
    return model


def _is_lossy(module: nn.Module) -> bool:
    return module.lossy and module.compresses if isinstance(module, CompressedLayer) else isinstance(module, LOSSY)


def _convert_layer(module: nn.Module, name: str, config, control: Control) -> None:
    own = resolve(config, name)
    if isinstance(module, CompressedLayer):
        if not module._explicit_config:
            if own is None:
                own = ActivationConfig(enabled=False)
            module.attach(own, name)
        else:
            module._state.name = name
    elif type(module) in COUNTERPARTS and own is not None:
        COUNTERPARTS[type(module)].convert(module, own, name)
    elif type(module) is NonDynamicallyQuantizableLinear:
        pass  # MultiheadAttention only reads its weight; a hook here would switch off PyTorch's fused evaluation
    elif isinstance(module, ParametrizationList):
        name_calls_of(module, None)  # what computes a weight has no samples, and its gradient no batch to average the noise
    elif isinstance(module, SUPPORTED):
        state = LayerState(name, own) if own is not None and own.enabled else None
        name_calls_of(module, state)
        if state is not None and isinstance(module, LOSSY):
            control.layers.append(state)
    if isinstance(module, CompressedLayer) and module.config.enabled and module.lossy:
        control.layers.append(module._state)
    keep_two_values(module)


_classes: dict[tuple[type, bool], type] = {}


def _class_for(plain: type, owns_config: bool) -> type:
    """The subclass of QModule and `plain`, one per plain class."""
    key = (plain, owns_config)
    if key not in _classes:
        body = {"__doc__": plain.__doc__, "__module__": plain.__module__, "_converted_from": plain, "_owns_config": owns_config}
        if owns_config:
            body["config"] = property(lambda self: self._control.config)
        meta = _Converted if type(plain) is type else type("_Converted", (_Converted, type(plain)), {})  # ABCMeta, ...
        _classes[key] = meta(plain.__name__, (QModule, plain), body)
    return _classes[key]


def _restore(plain: type, owns_config: bool, control: Control | None = None) -> nn.Module:
    cls = _class_for(plain, owns_config)
    model = cls.__new__(cls)
    if control is not None:
        model.__dict__["_control"] = control
    return model
