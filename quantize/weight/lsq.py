"""Activations on a learned grid, and where that grid starts."""

from __future__ import annotations

import contextlib
import math
import threading

import torch
import torch.distributed as dist
from torch import Tensor, nn

BINS = 2048  # of the histograms from which ranges are chosen
METHODS = ("mse", "minmax", "percentile")
PERCENTILE = 0.9999


class _Local(threading.local):
    alone = False


_local = _Local()


@contextlib.contextmanager
def alone():
    """For reports: within it this thread's quantizers ask no other process, which need not be making the same report."""
    previous, _local.alone = _local.alone, True
    try:
        yield
    finally:
        _local.alone = previous


def _has_partners() -> bool:
    return not _local.alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ActivationQuantizer(nn.Module):
    """``x`` on the grid ``step * ({0, ..., 2^bits - 1} - zero_point)`` with a learned step (LSQ, arXiv 1902.08153).

    The first tensor that is not all zeros decides where the step starts (the smallest squared error, as LSQ+, arXiv 2004.09576) and where
    zero lies, which is on the grid, so that padding is exact; :func:`quantize.calibrate` does it from several batches. The step's gradient
    is scaled by 1/sqrt(features of a sample * (2^bits - 1)).

    In a distributed run the first tensors in training decide together. In evaluation, where the other processes need not follow, each
    tensor gets a grid of its own until then.
    """

    layer_name = ""  # of the layer whose input it is

    def __init__(self, bits: int, device=None):
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=device))  # 0 or 1: averages of models know no bools
        self.initialized = False  # what `seen` holds, known without waiting for the device
        self.zeros = False  # whether tensors were seen with nothing else in them: a dead layer's, for which any grid will do
        self.observer: Observer | None = None

    @property
    def levels(self) -> int:
        """Steps from the grid's lower end to its upper."""
        return 2**self.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid; shape and dtype as given."""
        if self.observer is not None:
            self.observer.observe(x, self.layer_name)
            return x
        return self._on_grid(x, None if self.initialized else self._start_from(x))

    def _on_grid(self, x: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        step, zero_point = own or (self.step.float(), self.zero_point.float())  # model.half() takes them along
        if not self.initialized and own is None:  # zeros: the start fills both in place, and this call's graph may still hold them
            step, zero_point = step.clone(), zero_point.clone()
        features = x.shape[1:].numel() if x.dim() > 1 else x.numel()
        return torch.ops.quantize.lsq(x, step, zero_point, self.levels, 1 / math.sqrt(max(features, 1) * self.levels))

    def has_started(self) -> bool:
        """Whether data have been seen, by this quantizer or by one whose buffers were copied here, as averages of models do."""
        if not self.initialized and not self.seen.is_meta and bool(self.seen):
            self._read_buffers()
        return self.initialized

    def _read_buffers(self) -> None:
        self.initialized = bool(self.seen)

    def _start_from(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Starts, or returns step and zero point for this tensor alone."""
        if self.has_started():
            return None
        partners = _has_partners()
        observer = Observer(shared=partners and self.training)  # an empty `x` too: the others wait for this process
        for _ in range(2):
            observer.observe(x, self.layer_name)
            observer.advance()
        self.zeros = self.zeros or observer.zeros
        if not observer.reached:
            return None
        before, buffers = self.snapshot(), [b.clone() for b in self.buffers(recurse=False)]
        self.start(observer, "mse")
        if not partners or self.training:
            return None
        own = self.step.detach().float().clone(), self.zero_point.float().clone()
        self.restore(before)
        for buffer, value in zip(self.buffers(recurse=False), buffers, strict=True):
            buffer.copy_(value)
        return own

    @torch.no_grad()
    def start(self, observer: Observer, method: str) -> None:
        """Sets step and zero point from what `observer` has seen."""
        step, zero_point = observer.grid(self.levels, method)
        self.step.fill_(step)
        self.zero_point.fill_(zero_point)
        self.seen.fill_(1)
        self.initialized = True

    def snapshot(self) -> tuple[dict, list[Tensor]]:
        """What :meth:`restore` takes: all that a first tensor sets, less the buffers."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return own, [] if self.initialized else [p.detach().clone() for p in self.parameters(recurse=False)]

    @torch.no_grad()
    def restore(self, values: tuple[dict, list[Tensor]]) -> None:
        """Back to a :meth:`snapshot`. Parameters that were trained already are not written to: a graph may hold them."""
        own, parameters = values
        vars(self).update(own)
        if parameters:
            for parameter, value in zip(self.parameters(recurse=False), parameters, strict=True):
                parameter.copy_(value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_buffers()

    def extra_repr(self) -> str:
        """Bits, and whether data have been seen."""
        return f"bits={self.bits}, initialized={self.initialized}"


class Observer:
    """Range and then histogram of the tensors seen, over all processes if `shared`: two rounds over the same data."""

    def __init__(self, shared: bool = True):
        self.shared = shared
        self.round = 0
        self.low, self.high = 0.0, 0.0  # zero is always on the grid
        self.any = False
        self.counts: Tensor | None = None

    @property
    def reached(self) -> bool:
        """Whether anything but zeros was seen, which say nothing about a range."""
        return self.high > self.low

    @property
    def zeros(self) -> bool:
        """Whether something was seen, and nothing but zeros."""
        return self.any and not self.reached

    @torch.no_grad()
    def observe(self, x: Tensor, layer: str = "") -> None:
        """Takes note of a tensor, the input of `layer`. ValueError if it is not finite."""
        if not x.numel():
            return
        x, self.any = x.detach().float(), True
        if self.round == 0:
            low, high = (float(v) for v in x.aminmax())
            if not math.isfinite(low + high):
                of = f" of layer {layer!r}" if layer else ""
                raise ValueError(f"ActivationQuantizer{of}: input must be finite; got values from {low} to {high}")
            self.low, self.high = min(self.low, low), max(self.high, high)
        elif self.reached:
            counts = torch.histc(x, BINS, self.low, self.high).double().cpu()
            self.counts = counts if self.counts is None else self.counts + counts

    def advance(self) -> None:
        """Ends a round: what the processes saw is put together."""
        self.round += 1
        if not self.shared or not _has_partners():
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        if self.round == 1:
            ends = torch.tensor([-self.low, self.high], device=device, dtype=torch.float64)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            self.low, self.high = -float(ends[0]), float(ends[1])
        elif self.reached:
            counts = torch.zeros(BINS, dtype=torch.float64, device="cpu") if self.counts is None else self.counts
            counts = counts.to(device)
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    def grid(self, levels: int, method: str) -> tuple[float, int]:
        """(step, zero point) for a grid of `levels` steps."""
        if not self.reached or self.counts is None:
            return 1.0, 0
        low, high = self.low, self.high
        if method == "minmax":
            return _grid(low, high, levels)
        centers = torch.linspace(low, high, 2 * BINS + 1, dtype=torch.float64, device="cpu")[1::2]
        if method == "percentile":
            order = centers.abs().argsort()
            inside = self.counts[order].cumsum(0) <= PERCENTILE * self.counts.sum()
            bound = float(centers[order][inside].abs().max()) if inside.any() else max(-low, high)
            return _grid(max(low, -bound), min(high, bound), levels)
        best = None
        for part in range(100, 4, -2):
            step, zero_point = _grid(low * part / 100, high * part / 100, levels)
            rounded = ((centers / step).round() + zero_point).clamp(0, levels) - zero_point
            error = float((self.counts * (centers - step * rounded).square()).sum())
            if best is None or error < best[0]:
                best = error, step, zero_point
        return best[1:]


def _grid(low: float, high: float, levels: int) -> tuple[float, int]:
    step = (high - low) / levels
    return step, min(max(round(-low / step), 0), levels)
