"""The forward passes behind a sensitivity: which are run, by which process, and how an interrupted measurement goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..weight.config import WeightConfig
from .file import read, write
from .fingerprint import fingerprint
from .metrics import as_logits, gauss_newton_features, loss_slope
from .replay import Call, call
from .switches import SwitchedModel

METHODS = ("gauss_newton", "clado", "diagonal")
FORMAT = "quantize.sensitivity_checkpoint/1"
TABLES = ("single", "pair")
SAVE_EVERY = 30  # seconds
WHO = "measure_sensitivity"
BAR = "{desc}: {percentage:3.0f} %|{bar}| {elapsed} of about {remaining} more"


class Survey:
    """The sums over samples that a sensitivity is made of. `measure(output, targets, who)` makes a metric of the float model's output."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple],
        layers: Sequence[Sequence[str]],
        configs: Sequence[WeightConfig | None],
        method: str,
        metric: str,
        measure: Callable,
        checkpoint,
        progress: bool,
    ):
        self.batches, self.method, self.metric, self.measure, self.checkpoint = batches, method, metric, measure, checkpoint
        self.layers, self.choices = len(layers), len(configs)
        self.quantized = [k for k, config in enumerate(configs) if config is not None]
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.mark = fingerprint(model, batches, (layers, configs, method, metric, repr(measure)))
        if self.world > 1 and not self._alike(int(self.mark[:12], 16)):
            raise ValueError(f"{WHO}: model and batches must be the same in all processes; they are not")
        self.switched = SwitchedModel(model, layers, configs)
        count, device = self.layers * self.choices, next(model.parameters()).device
        self.single = torch.zeros(count, dtype=torch.float64, device=device)  # sums over samples
        self.pair = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.samples: list[int] = []  # in each batch
        self.done = 0  # units of this process: batches of Gauss-Newton, else a layer's choice in a batch
        self.unit = 0  # the one that comes next
        self.saved = time.monotonic()
        self.bar = tqdm(desc="sensitivity", delay=2, disable=not progress or self.rank > 0, bar_format=BAR)

    def _reduced(self, tensor: Tensor, op: str = "SUM") -> Tensor:
        if self.world == 1:
            return tensor
        moved = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(moved, getattr(dist.ReduceOp, op))
        return moved.to(tensor.device)

    def _alike(self, number: int) -> bool:
        ends = self._reduced(torch.tensor([number, -number]), "MAX")
        return int(ends[0]) == -int(ends[1])

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Runs what is left to run. float64 [L*K, L*K] on the CPU."""
        finished = False
        try:
            self.switched.calibrate([inputs for inputs, _ in self.batches], lambda inputs: call(self.switched.model, inputs))
            sound = self._sound_layers()
            self._resume()
            for inputs, targets in self.batches:
                output, record = call(self.switched.replay.record, inputs)
                starts = [at if sound[layer] else 0 for layer, at in enumerate(self.switched.starts(record))]
                if self.bar.total is None:
                    self._plan(record, starts)
                (self._gauss_newton if self.method == "gauss_newton" else self._differences)(inputs, targets, output, record, starts)
            finished = True
        finally:
            self.bar.close()
            if not finished:
                self._save()
        matrix = self._matrix() / sum(self.samples)
        if self.checkpoint is not None and os.path.exists(self._path()):
            os.unlink(self._path())
        return matrix

    def _matrix(self) -> Tensor:
        if self.method == "gauss_newton":
            return (self.pair + torch.diag(self.single)).cpu()
        single = self._reduced(self.single).cpu()
        if self.method == "diagonal":
            return torch.diag(single)
        pair = self._reduced(self.pair).cpu()
        pair = pair + pair.T
        layer = torch.arange(len(single)) // self.choices
        quantized = torch.isin(torch.arange(len(single)) % self.choices, torch.tensor(self.quantized))
        measured = (layer[:, None] != layer) & quantized[:, None] & quantized
        return torch.diag(single) + torch.where(measured, (pair - single[:, None] - single) / 2, 0)

    def _gauss_newton(self, inputs, targets, output, record: Call, starts: list[int]) -> None:
        reference = as_logits(output, WHO)
        self.samples.append(len(reference))
        self.unit += 1
        if self.unit <= self.done:
            return
        changed = torch.zeros(self.layers * self.choices, reference.numel(), dtype=torch.float64, device=reference.device)
        linear = torch.zeros_like(self.single)
        for layer in range(self.rank, self.layers, self.world):
            for k in self.quantized:
                with self.switched.chosen(layer, k):
                    logits = as_logits(call(self.switched.replay.run, inputs, record, starts[layer]), WHO)
                row = layer * self.choices + k
                changed[row] = gauss_newton_features(reference, logits)
                if self.metric == "loss":
                    linear[row] = loss_slope(reference, logits, targets, WHO)
                self._passed(self.shares[layer])
        changed = self._reduced(changed)
        self.pair += changed @ changed.T / 2
        self.single += self._reduced(linear)
        self._unit_done()

    def _differences(self, inputs, targets, output, record: Call, starts: list[int]) -> None:
        """Of every choice of a layer, and for "clado" with every choice of every layer called after it."""
        metric = self.measure(output, targets, WHO)
        self.samples.append(metric.samples)
        run, chosen = self.switched.replay.run, self.switched.chosen
        order = sorted(range(self.layers), key=lambda layer: starts[layer])
        units = [(place, layer, k) for place, layer in enumerate(order) for k in self.quantized]
        for place, layer, k in units[self.rank :: self.world]:
            self.unit += 1
            if self.unit <= self.done:
                continue
            row = layer * self.choices + k
            single, pair = 0.0, torch.zeros_like(self.single)
            with chosen(layer, k):
                if self.method == "diagonal":
                    single = metric(call(run, inputs, record, starts[layer]))
                    self._passed(self.shares[layer])
                else:
                    output, with_layer = call(self.switched.replay.record, inputs)
                    single = metric(output)
                    self._passed(1)
                    for other in order[place + 1 :]:
                        for j in self.quantized:
                            with chosen(other, j):
                                pair[other * self.choices + j] = metric(call(run, inputs, with_layer, starts[other]))
                            self._passed(self.shares[other])
            self.single[row] += single
            self.pair[row] += pair
            self._unit_done()

    def _sound_layers(self) -> list[bool]:
        """Whether what comes before a layer is indeed not changed by its bits: not where a module uses the weight of one called later.

        Tried on two samples, against complete passes.
        """
        inputs = first_two(self.batches[0][0])
        _, record = call(self.switched.replay.record, inputs)
        sound = []
        for layer, start in enumerate(self.switched.starts(record)):
            with self.switched.chosen(layer, self.quantized[0] if self.quantized else None):
                partial = call(self.switched.replay.run, inputs, record, start)
                complete = call(self.switched.model, inputs)
            sound.append(same(partial, complete))
        return sound

    def _plan(self, record: Call, starts: list[int]) -> None:
        """How much of a forward pass comes after each layer's beginning, and the passes that are left."""
        times = torch.tensor(leaf_times(record))
        self.shares = [float((times >= start).double().mean()) for start in starts]
        each = len(self.quantized)
        if self.method == "clado":
            after = sorted(self.shares, reverse=True)
            total = each * (len(after) + each * sum(place * share for place, share in enumerate(after)))
        else:
            total = each * sum(self.shares)
        self.bar.reset(total=total * len(self.batches) / self.world)

    def _passed(self, share: float) -> None:
        self.bar.update(share)

    def _unit_done(self) -> None:
        self.done = self.unit
        if time.monotonic() - self.saved > SAVE_EVERY:
            self._save()

    def _path(self) -> str:
        return os.fspath(self.checkpoint) + (f".{self.rank}-of-{self.world}" if self.world > 1 else "")

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.checkpoint is not None and self.done:
            tensors = {"single": self.single.cpu(), "pair": self.pair.cpu()}
            write(tensors, {"format": FORMAT, "mark": self.mark, "done": self.done}, self._path())

    def _resume(self) -> None:
        if self.checkpoint is not None and os.path.exists(self._path()):
            tensors, fields = read(self._path(), f"{WHO}: checkpoint", FORMAT, TABLES)
            if fields.get("mark") != self.mark:
                raise ValueError(f"{WHO}: checkpoint {self._path()} must be of this model, these batches and arguments; it is of others")
            self.single.copy_(tensors["single"])
            self.pair.copy_(tensors["pair"])
            self.done = fields["done"]
        if self.method == "gauss_newton" and self.world > 1 and not self._alike(self.done):
            self.done = 0  # the processes were stopped in different batches
            self.single.zero_()
            self.pair.zero_()


def first_two(inputs):
    """The first two samples, where the inputs are a tensor with samples in dimension 0; else all."""
    return inputs[:2] if isinstance(inputs, Tensor) and inputs.dim() > 1 else inputs


def same(a, b) -> bool:
    """Whether two outputs are equal, up to what the order of a sum may change."""
    a, b = (tree_leaves(output) for output in (a, b))
    pairs = zip(a, b, strict=True)
    return all(torch.allclose(x, y, 1e-5, 1e-6, equal_nan=True) if isinstance(x, Tensor) else x == y for x, y in pairs)


def leaf_times(record: Call) -> list[int]:
    """When the calls began that have none inside."""
    found, left = [], [record]
    while left:
        one = left.pop()
        left += one.children
        if not one.children:
            found.append(one.start)
    return found
