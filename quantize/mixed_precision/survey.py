"""The forward passes behind a sensitivity: which are run, by which process, and how an interrupted measurement goes on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..weight.config import WeightConfig
from .checkpoint import Checkpoint, Sums
from .choices import choice_text, weight_bits_of
from .composition import composed_pairs
from .fingerprint import fingerprint, spelled
from .metrics import as_logits, gauss_newton_features, loss_slope, refuse_classes_last
from .replay import Call, call, samples_in
from .switches import SwitchedModel

METHODS = ("gauss_newton", "composed", "clado", "diagonal")
SAVE_EVERY = 30  # seconds
WHO = "measure_sensitivity"
BAR = "{desc}: {percentage:3.0f} %|{bar}| {elapsed} of about {remaining} more"


class Survey:
    """The sums over samples that a sensitivity is made of. `measure(output, targets, who)` makes a metric of the float model's output."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple],
        members: Mapping[str, Sequence[str]],
        configs: Sequence[WeightConfig | None],
        method: str,
        metric: str,
        measure: Callable,
        checkpoint,
        progress: bool,
    ):
        self.batches, self.method, self.metric, self.measure = batches, method, metric, measure
        layers = list(members.values())
        self.layers, self.choices = len(layers), len(configs)
        at = [None if config is None else choice_text((weight_bits_of(config), config.activation_bits)) for config in configs]
        self.chosen = [[f"{name!r} at {choice}" for choice in at] for name in members]  # in words
        self.quantized = [k for k, config in enumerate(configs) if config is not None]
        self.coarsest = min(self.quantized, key=lambda k: weight_bits_of(configs[k]), default=None)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        mark = fingerprint(model, batches, (layers, configs, method, metric, spelled(measure)))
        if self.world > 1 and not self._alike(int(mark[:12], 16)):
            raise ValueError(f"{WHO}: model and batches must be the same in all processes; they are not")
        if checkpoint is not None and self.world > 1:
            checkpoint = f"{os.fspath(checkpoint)}.{self.rank}-of-{self.world}"
        self.checkpoint = Checkpoint(checkpoint, mark, WHO)
        self.switched = SwitchedModel(model, layers, configs)
        count, device = self.layers * self.choices, next(model.parameters()).device
        zeros = torch.zeros(count, count + 1, dtype=torch.float64, device=device)
        self.nothing = self.sums = Sums(zeros[:, 0], zeros[:, 1:], 0)
        self.by_logits = method in ("gauss_newton", "composed")
        self.samples: list[int] = []  # in each batch
        self.unit = 0  # the one that comes next
        self.saved = time.monotonic()
        every = 0.5 if sys.stderr.isatty() else 30  # a log wants few lines
        self.bar = tqdm(desc="sensitivity", delay=2, mininterval=every, disable=not progress or self.rank > 0, bar_format=BAR)

    def _reduced(self, tensor: Tensor, op: str = "SUM") -> Tensor:
        if self.world == 1:
            return tensor
        moved = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu").clone(memory_format=torch.contiguous_format)
        dist.all_reduce(moved, getattr(dist.ReduceOp, op))
        return moved.to(tensor.device)

    def _alike(self, number: int) -> bool:
        ends = self._reduced(torch.tensor([number, -number]), "MAX")
        return int(ends[0]) == -int(ends[1])

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Runs what is left to run. float64 [L*K, L*K] on the CPU. The checkpoint stays, for who asked to remove."""
        finished = False
        try:
            self.switched.calibrate([inputs for inputs, _ in self.batches], lambda inputs: call(self.switched.model, inputs))
            self.sound = self._sound_layers()
            self._resume()
            for inputs, targets in self.batches:
                output, record = call(self.switched.replay.record, inputs)
                starts = self._starts(record)
                if self.bar.total is None:
                    self._plan(record, starts)
                (self._changes if self.by_logits else self._differences)(inputs, targets, output, record, starts)
            finished = True
        finally:
            self.bar.close()
            if not finished:
                self.save()
        return self._matrix().cpu()

    def _matrix(self) -> Tensor:
        samples = sum(self.samples)
        if self.method == "gauss_newton":
            return (self.sums.pair + torch.diag(self.sums.single)) / samples
        if self.method == "composed":
            count = self.layers * self.choices
            pairs = self._reduced(composed_pairs(*self.sums[:2], range(self.rank, count, self.world)))
            return cross_terms(pairs) / samples
        single = torch.diag(self._reduced(self.sums.single))
        if self.method == "diagonal":
            return single / samples
        number = torch.arange(len(single), device=single.device)
        layer, quantized = number // self.choices, torch.isin(number % self.choices, torch.tensor(self.quantized, device=single.device))
        measured = (layer[:, None] != layer) & quantized[:, None] & quantized
        matrix = cross_terms(single + self._reduced(self.sums.pair)) / samples
        return torch.where(measured, matrix, torch.diag(matrix.diagonal()))

    def _changes(self, inputs, targets, output, record: Call, starts: list[int]) -> None:
        """Of the logits, by every choice of a layer."""
        refuse_classes_last(output, targets, WHO)
        reference = as_logits(output, WHO)
        self.samples.append(len(reference))
        self.unit += 1
        if self.unit <= self.sums.done:
            self._skipped(len(self.quantized) * sum(self.shares[self.rank :: self.world]))
            return
        changes = torch.zeros(self.layers * self.choices, *reference.shape, dtype=torch.float64, device=reference.device)
        for layer in range(self.rank, self.layers, self.world):
            for k in self.quantized:
                with self.switched.chosen(layer, k):
                    logits = as_logits(call(self.switched.replay.run, inputs, record, starts[layer]), WHO)
                changes[layer * self.choices + k] = logits - reference
                self._passed(self.shares[layer])
        changes = self._reduced(changes)
        if self.method == "composed":
            before = self.sums if self.sums.done else Sums(reference[:0], changes[:, :0], 0)
            self._unit_done(torch.cat([before.single, reference]), torch.cat([before.pair, changes], 1))
            return
        features = gauss_newton_features(reference, changes)
        single, pair, _ = self.sums
        if self.metric == "loss":
            single = single + loss_slope(reference, changes, targets, WHO)
        self._unit_done(single, pair + features @ features.T / 2)

    def _differences(self, inputs, targets, output, record: Call, starts: list[int]) -> None:
        """Of every choice of a layer, and for "clado" with every choice of every layer called after it."""
        # Structures of targets have no length that means anything.
        samples = len(targets) if isinstance(targets, list) or (isinstance(targets, Tensor) and targets.dim()) else samples_in(inputs)
        metric = self.measure(output, targets, samples, WHO)
        self.samples.append(metric.samples)
        run, chosen, words = self.switched.replay.run, self.switched.chosen, self.chosen
        order = sorted(range(self.layers), key=lambda layer: starts[layer])
        units = [(place, layer, k) for place, layer in enumerate(order) for k in self.quantized]
        for place, layer, k in units[self.rank :: self.world]:
            self.unit += 1
            if self.unit <= self.sums.done:
                after = sum(self.shares[other] for other in order[place + 1 :])
                self._skipped(1 + len(self.quantized) * after if self.method == "clado" else self.shares[layer])
                continue
            row = layer * self.choices + k
            single, pair = torch.zeros_like(self.sums.single), torch.zeros_like(self.sums.pair)
            with chosen(layer, k):
                if self.method == "diagonal":
                    single[row] = metric(call(run, inputs, record, starts[layer]), words[layer][k])
                    self._passed(self.shares[layer])
                else:
                    output, with_layer = call(self.switched.replay.record, inputs)
                    single[row] = metric(output, words[layer][k])
                    self._passed(1)
                    beginnings = self._starts(with_layer)  # not those of the float pass where the calls depend on data
                    for other in order[place + 1 :]:
                        for j in self.quantized:
                            with chosen(other, j):
                                output = call(run, inputs, with_layer, beginnings[other])
                                pair[row, other * self.choices + j] = metric(output, f"{words[layer][k]} and {words[other][j]}")
                            self._passed(self.shares[other])
            self._unit_done(self.sums.single + single, self.sums.pair + pair)

    def _starts(self, record: Call) -> list[int]:
        return [start if sound else 0 for start, sound in zip(self.switched.starts(record), self.sound, strict=True)]

    def _sound_layers(self) -> list[bool]:
        """Whether what comes before a layer is indeed not changed by its bits: not where a module uses the weight of one called later.

        Tried on two samples and the fewest bits, against complete passes.
        """
        inputs = first_two(self.batches[0][0])
        _, record = call(self.switched.replay.record, inputs)
        sound = []
        for layer, start in enumerate(self.switched.starts(record)):
            with self.switched.chosen(layer, self.coarsest):
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
        self.bar.total = total * len(self.batches) / self.world + 1e-6  # or rounding would take the sum of shares beyond it
        self.bar.unpause()  # its clock begins here; reset() would show it at once, and a log would have that without an end of line

    def _passed(self, share: float) -> None:
        self.bar.update(share)

    def _skipped(self, passes: float) -> None:
        """What was done before an interruption does not count for the speed."""
        if not self.bar.disable:
            self.bar.initial += passes
            self.bar.n += passes

    def _unit_done(self, single: Tensor, pair: Tensor) -> None:
        self.sums = Sums(single, pair, self.unit)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """What was measured so far, where there is a checkpoint."""
        self.saved = time.monotonic()
        self.checkpoint.save(self.sums)

    def _resume(self) -> None:
        """Or all processes raise, if the file of one is not to be used: none may wait for it."""
        problem = None
        try:
            self.sums = self.checkpoint.load(self.nothing)
        except (ValueError, OSError) as error:
            problem = error
        if int(self._reduced(torch.tensor(problem is not None, dtype=torch.int), "MAX")):
            raise problem or ValueError(f"{WHO}: checkpoint must be of this measurement in all processes; another process' is not")
        if self.by_logits and not self._alike(self.sums.done):
            self.sums = self.nothing  # the processes were stopped in different batches


def cross_terms(together: Tensor) -> Tensor:
    """Equation 8 of CLADO, of the values of pairs on one side of the diagonal, and of single choices on it."""
    single = together.diagonal()
    matrix = (together + together.T - single[:, None] - single) / 2
    matrix.diagonal().copy_(single)
    return matrix


def first_two(inputs):
    """The first two samples, where the inputs are a tensor with samples in dimension 0; else all."""
    return inputs[:2] if isinstance(inputs, Tensor) and inputs.dim() > 1 else inputs


def same(a, b) -> bool:
    """Whether two outputs are equal, up to what the order of a sum may change. Not if there is nothing to compare."""
    a, b = ([leaf for leaf in tree_leaves(getattr(output, "logits", output)) if isinstance(leaf, Tensor)] for output in (a, b))
    if not a or [x.shape for x in a] != [x.shape for x in b]:
        return False
    return all(torch.allclose(x, y, 1e-5, 1e-6, equal_nan=True) for x, y in zip(a, b, strict=True))


def leaf_times(record: Call) -> list[int]:
    """When the calls began that have none inside."""
    found, left = [], [record]
    while left:
        one = left.pop()
        left += one.children
        if not one.children:
            found.append(one.start)
    return found
