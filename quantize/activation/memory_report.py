"""What a forward pass saves for the backward, by layer, beside what the plain model would save."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..calls import call
from ..checks import check_module
from ..dtypes import FLOATS
from ..layers.base import CompressedLayer
from ..patterns import resolve
from ..table import aligned, kib
from ..weight.lsq import ActivationQuantizer, alone
from .control import Control
from .module import controls_of
from .state import LayerState, note_op, noted_op, override

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # of which oneDNN and cuDNN keep bytes of their own making
SMALL = 4096  # bytes: what a channel-wise statistic or a loss takes, not worth a reason


class LayerMemory(NamedTuple):
    """One row: what an op of a layer saved. `bits` per element as stored; `reason`: why it is in full precision, else empty."""

    name: str
    op: str
    bits: float
    bytes: int
    reason: str


class MemoryReport:
    """What :func:`memory_report` returns; printing it gives a table.

    Attributes:
        saved_bytes: bytes of all storages alive for the backward, each once, without parameters and buffers.
        baseline_bytes: the same of the plain model.
        ratio: baseline over saved.
        layers: list of LayerMemory (name, op, bits, bytes, reason), the largest first.
    """

    def __init__(self, saved_bytes: int, baseline_bytes: int, layers: list[LayerMemory]):
        self.saved_bytes, self.baseline_bytes, self.layers = saved_bytes, baseline_bytes, layers

    @property
    def ratio(self) -> float:
        """baseline_bytes / saved_bytes."""
        return self.baseline_bytes / max(self.saved_bytes, 1)

    def __str__(self):
        rows = [(r.name, r.op, f"{r.bits:.3g}", kib(r.bytes), r.reason) for r in self.layers]
        mib = 2**20
        return (
            f"{aligned(('layer', 'op', 'bits', 'KiB', 'in full precision because'), rows, '<<>><')}\n"
            f"saved for backward: {self.saved_bytes / mib:,.2f} MiB; "
            f"the plain model: {self.baseline_bytes / mib:,.2f} MiB ({self.ratio:.1f} times as much)"
        )

    def __repr__(self):
        return f"MemoryReport(saved_bytes={self.saved_bytes}, baseline_bytes={self.baseline_bytes}, layers=[{len(self.layers)} rows])"


def memory_report(model: nn.Module, *inputs) -> MemoryReport:
    """Runs ``model(*inputs)`` forward, twice, and reports what was saved for the backward with compression and without.

    Nothing of the model changes: buffers (BatchNorm statistics), random generators, what adaptive bits have learned and activation
    quantizers that have not started are as before. One process of a distributed run may report alone; only synchronised batch norms in
    training, and DistributedDataParallel around the model, wait for the others.

    Args:
        model: any module, in the mode (train or eval) that matters.
        inputs: its positional arguments; a mapping alone: its arguments by name.

    Returns:
        MemoryReport: bytes with compression and without, and a row for each op of a layer that saved something.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: in torch.inference_mode().

    Example:
        >>> model = quantize.QModule(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), quantize.ActivationConfig(bits=2, max_bits=2))
        >>> report = quantize.memory_report(model, torch.randn(2, 8, 32, 32))
        >>> report.baseline_bytes > 8 * report.saved_bytes
        True
    """
    check_module("memory_report", model)
    if torch.is_inference_mode_enabled():
        raise ValueError("memory_report: model must not be run in torch.inference_mode(), where nothing is saved for a backward")
    with unchanged(model), torch.enable_grad():
        saved = _forward(model, inputs)
        rows = _rows(model, saved)
        saved_bytes = sum(nbytes for nbytes, _ in saved.values())
        del saved
    with unchanged(model), torch.enable_grad(), override(disabled=True):
        baseline = sum(nbytes for nbytes, _ in _forward(model, inputs).values())
    return MemoryReport(saved_bytes, baseline, rows)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers, generators, adaptive states and what starts with the first input on leaving. Asks no other process, and compiles
    nothing."""
    quantizers = [(m, m.snapshot()) for m in model.modules() if isinstance(m, ActivationQuantizer)]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    states = [(s, s.snapshot()) for s in _states(model)]
    held = [(control, dict(control.functional), control.indices, list(control.arriving)) for control in controls_of(model).values()]
    for control, *_ in held:
        control.indices = None  # of the training's next batch, which is not the report's
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), alone(), _as_written():
        try:
            yield
        finally:
            for quantizer, values in quantizers:
                quantizer.restore(values)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for state, values in states:
                state.restore(values)
            for control, *values in held:
                control.functional, control.indices, control.arriving = values


def _as_written():
    """Within it, what is compiled runs as it is written: compiled code would not ask whether it is to compress."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _states(model: nn.Module) -> list[LayerState]:
    states = {id(m._state): m._state for m in model.modules() if isinstance(m, CompressedLayer)}
    for control in controls_of(model).values():
        states |= {id(s): s for s in control.states()}
    return list(states.values())


class _Saved:
    """What autograd holds in place of a tensor; it dies with the graph node, so what is left after the forward is what is live."""

    def __init__(self, tensor: Tensor, name: str, op: str):
        self.tensor, self.name, self.op = tensor, name, op


class _NoteOps(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        note_op(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _forward(model: nn.Module, inputs: tuple) -> dict[int, tuple[int, list[_Saved]]]:
    """Storage address to (bytes, what is saved of it), for all live storages that are neither parameters nor buffers."""
    own = {part.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] for part in _parts(t)}
    stack, saved = [""], []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name), prepend=True))
        handles.append(module.register_forward_hook(lambda m, a, o: _leave(stack), always_call=True))

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor.detach(), stack[-1], noted_op())  # detached: a node that held its own output would never die
        saved.append(weakref.ref(holder))
        return holder

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor), _NoteOps():
            output = call(model, *inputs)
    finally:
        for handle in handles:
            handle.remove()
    live: dict[int, tuple[int, list[_Saved]]] = {}
    for reference in saved:
        holder = reference()
        for part in () if holder is None else _parts(holder.tensor):
            storage = part.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in own:
                live.setdefault(storage.data_ptr(), (storage.nbytes(), []))[1].append(holder)
    del output
    return live


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that it is, or is made of, as a DTensor is of its own process's part."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
    return [tensor] if isinstance(tensor, Tensor) and tensor.layout == torch.strided else []  # a DTensor's mesh is a part too


def _leave(stack: list[str]) -> None:  # returns None: a hook's value would replace the output
    stack.pop()


def _rows(model: nn.Module, live: dict[int, tuple[int, list[_Saved]]]) -> list[LayerMemory]:
    modules, controls = dict(model.named_modules()), controls_of(model)
    totals: dict[tuple[str, str, str], list[float]] = {}
    for nbytes, holders in live.values():
        first = holders[0]
        module, tensor = modules.get(first.name), first.tensor
        op = module.plain.__name__ if isinstance(module, CompressedLayer) else first.op
        compressed = tensor.dtype in (torch.uint8, torch.int16) and op not in RECURRENT
        reason = "" if compressed else _reason(controls, module, first.name, tensor, op)
        bits = tensor.element_size() * 8 if not compressed else _bits_of(controls, module, first.name, op)
        entry = totals.setdefault((first.name, op, reason), [bits, 0])
        entry[1] += nbytes
    for name, op, reason in [key for key, (_, nbytes) in totals.items() if key[2] and nbytes <= SMALL]:
        bits, nbytes = totals.pop((name, op, reason))
        totals.setdefault((name, op, ""), [bits, 0])[1] += nbytes
    rows = [LayerMemory(name, op, bits, int(nbytes), reason) for (name, op, reason), (bits, nbytes) in totals.items()]
    return sorted(rows, key=lambda r: -r.bytes)


def _control_of(controls: dict[str, Control], name: str) -> tuple[Control | None, str]:
    """Of the innermost QModule that the module `name` is in, and the module's name there."""
    inside = [root for root in controls if not root or f"{name}.".startswith(f"{root}.")]
    if not inside:
        return None, name
    root = max(inside, key=len)
    return controls[root], name[len(root) :].removeprefix(".")


def _bits_of(controls: dict[str, Control], module, name: str, op: str) -> float:
    if isinstance(module, CompressedLayer) and module.lossy:
        return module._state.used_bits()
    if "pool" in op.lower():
        return 8
    if ("relu" in op.lower() and op != "prelu") or "hardtanh" in op.lower() or "dropout" in op.lower():
        return 1
    control, name = _control_of(controls, name)
    states = control.states() if control is not None else []
    used = [] if "attention" in op else [s.used_bits() for s in states if s.name == name]  # which is not the module's own linear layer's
    used = used or [s.used_bits() for s in states if "#" in s.name and s.name.partition("#")[0] in op]  # calls outside any layer
    return sum(used) / len(used) if used else 8


def _reason(controls: dict[str, Control], module, name: str, tensor: Tensor, op: str) -> str:
    if tensor.dtype == torch.uint8:
        return f"workspace of PyTorch's {op}, kept as it is"
    if tensor.dtype not in FLOATS:
        return f"{str(tensor.dtype).removeprefix('torch.')} is kept as it is"
    control, name = _control_of(controls, name)
    config = module.config if isinstance(module, CompressedLayer) else resolve(control.config, name) if control is not None else None
    if config is None or not config.enabled:
        return "disabled by its config" if control is not None or config is not None else "not converted by QModule"
    if "norm" in op.lower() and tensor.dim() == 1:
        return "statistics, a number a channel"
    if "norm" in op.lower() and (tensor.shape[-1] == 1 or (tensor.dim() == 2 and "group" in op.lower())):
        return "statistics, a number a row"
    if "attention" in op:
        return "attention's mask, kept as it is"
    if op.startswith("conv") and not isinstance(module, CompressedLayer):
        return "a computed weight, kept as it is"
    return f"no compressed version of {op or 'this op'}"
