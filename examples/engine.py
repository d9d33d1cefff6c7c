"""A run and its two loops: one epoch of training, and a test."""

import math
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import islice

import torch
from quantize import reestimate_batch_norm
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data import Loader
from interrupt import StopRequest
from learned_bits import LearnedBits
from nonfinite import first_nonfinite
from processes import Processes
from schedule import learning_rate

# A gradient scaler that has halved its scale so often in a row, from 2^16 to 2^-9, is not what is wrong.
PATIENCE = 25


@dataclass
class Run:
    """A model in training and how far it has come."""

    args: Namespace
    processes: Processes
    model: nn.Module  # what checkpoints hold
    net: nn.Module  # what computes: the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in the epoch under way
    best: float = -1.0  # top-1 accuracy of the best checkpoint, percent
    totals: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # loss, hits, images of this process in this epoch
    bits: LearnedBits | None = None  # of a model that learns its bits
    seconds: float = 0.0  # of the epoch under way, before the run was stopped
    times: list[float] = field(default_factory=list)  # of the steps in it, seconds
    skipped: int = 0  # steps that left weights or bits as they were, because of gradients that were not finite
    skipped_in_a_row: int = 0  # up to now

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that step, the weights' one first."""
        return [self.optimizer, self.bits.optimizer] if self.bits and self.bits.alone else [self.optimizer]


def autocast(run: Run):
    """The automatic mixed precision that `--amp` asks for."""
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.args.amp]
    return torch.autocast(run.processes.device.type, dtype, enabled=run.args.amp != "off")


def show(run: Run, images: Tensor, indices: Tensor | None = None) -> Tensor:
    """`images` on the run's device in its memory format; a compressed model is told whose `indices` they are."""
    if indices is not None and hasattr(run.model, "set_sample_indices"):
        run.model.set_sample_indices(indices)
    layout = torch.channels_last if run.args.channels_last else torch.contiguous_format
    return images.to(run.processes.device, non_blocking=True, memory_format=layout)


def train_epoch(run: Run, loader: Loader, stop: StopRequest) -> float | None:
    """Train from `run.step` to the end of `run.epoch`; the median step time in ms, or None if a stop was asked for before the end.

    Raises FloatingPointError, naming the layer, when the loss is not finite: before that step touches the weights. Under a gradient scaler
    such a step is skipped, and PATIENCE of them in a row raise.
    """
    args, steps = run.args, len(loader)
    run.net.train()
    before = time.perf_counter()
    title = f"epoch {run.epoch + 1}/{args.epochs}"
    # disable=None: no bar where the output is not a terminal
    bar = tqdm(total=steps, initial=run.step, desc=title, leave=False, disable=None if run.processes.first else True)
    with bar:
        for images, targets, indices in loader.epoch(run.epoch, run.step):
            set_learning_rates(run, run.epoch + (run.step + 0.5) / steps)
            train_step(run, images, targets, indices)
            now = time.perf_counter()
            run.times.append(now - before)
            before = now
            if run.step % args.print_freq == 0 or run.step == steps:
                loss, hits, count = run.totals.tolist()
                count = max(count, 1)  # all may have been skipped
                bar.set_postfix_str(f"loss {loss / count:.3f}, top-1 {100 * hits / count:.2f} %", refresh=False)
                bar.update(run.step - bar.n)
            if run.processes.any(stop.requested):
                return None
    return 1000 * statistics.median(run.times) if run.times else 0.0


def set_learning_rates(run: Run, position: float) -> None:
    """The rates at `position`, in epochs: the bits, where they are learned, have a peak of their own."""
    args = run.args

    def rate(peak):
        return learning_rate(args.lr_scheduler, peak, position, args.epochs, args.lr_warmup_epochs, args.lr_milestones)

    for group in run.optimizer.param_groups:
        group["lr"] = rate(args.lr)
    if run.bits is not None:
        run.bits.group["lr"] = rate(args.bits_lr)


def train_step(run: Run, images: Tensor, targets: Tensor, indices: Tensor) -> None:
    """Forward, backward and update on one batch, counted in the run's totals."""
    images, targets = show(run, images, indices), targets.to(run.processes.device)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    buffers = [buffer.clone() for buffer in run.model.buffers()] if run.scaler.is_enabled() else []
    with autocast(run):
        output = run.net(images)
        loss = F.cross_entropy(output, targets, label_smoothing=run.args.label_smoothing)
    # Both before the backward pass is queued: a GPU then works on it while the next batch is prepared.
    value, hits = loss.item(), (output.detach().argmax(1) == targets).sum().item()
    # In all processes: the others would wait in the backward pass.
    if not run.scaler.is_enabled() and run.processes.any(not math.isfinite(value)):
        raise FloatingPointError(lament(run, value, images))
    update(run, loss if run.bits is None else loss + run.bits.loss(run.model))
    if not math.isfinite(value):
        # The scaler has kept the overflow from the weights, but batch norms have it in their running statistics.
        for buffer, before in zip(run.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    if run.skipped_in_a_row >= PATIENCE:
        raise FloatingPointError(f"{PATIENCE} steps in a row were skipped for gradients that are not finite; {lament(run, value, images)}")
    run.step += 1
    if math.isfinite(value):
        run.totals += torch.tensor([value * len(targets), hits, len(targets)], dtype=torch.float64)


def update(run: Run, loss: Tensor) -> None:
    """Backward and the optimizers' steps; one that a gradient scaler or the bits' guard skips is counted."""
    run.scaler.scale(loss).backward()
    if run.args.clip_grad_norm:
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)
        # Where a gradient is NaN, this makes all of them NaN, those of an optimizer too that the scaler has found in order.
        nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip_grad_norm)
    scale, guarded = run.scaler.get_scale(), run.bits and run.bits.guard.skipped
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
    run.scaler.update()
    lost = run.scaler.get_scale() < scale or (run.bits and run.bits.guard.skipped) != guarded
    run.skipped += lost
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if lost else 0


def lament(run: Run, value: float, images: Tensor) -> str:
    """Which loss it was at which step, and which layer is to blame."""
    where = f"loss is {value} at step {run.step + 1} of epoch {run.epoch + 1}"
    if math.isfinite(value):
        return (
            f"{where}, its scale {run.scaler.get_scale():g}" if run.scaler.is_enabled() else f"{where}, but not finite in another process"
        )
    with autocast(run):
        return f"{where}; {first_nonfinite(run.model, images)}"


def reestimate(run: Run, loader: Loader) -> None:
    """With `--reestimate-bn` give the batch norms the statistics of the weights as they are now, which running averages lag behind."""
    if run.args.reestimate_bn:
        batches = islice(loader.epoch(0), run.args.reestimate_bn)  # always the same ones
        device = run.processes.device
        with autocast(run), torch.random.fork_rng([device] if device.type == "cuda" else []):
            reestimate_batch_norm(run.model, (show(run, images, indices) for images, _, indices in batches))


@torch.no_grad()
def test(run: Run, loader: Loader, stop: StopRequest) -> tuple[float, float] | None:
    """Cross entropy and top-1 accuracy (percent) over all processes, each image counted once; None if a stop was asked for."""
    run.processes.share_buffers(run.model)
    run.model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for images, targets, _ in loader.epoch(0):
        if len(images):
            images, targets = show(run, images), targets.to(run.processes.device)
            with autocast(run):
                output = run.model(images).float()
            loss = F.cross_entropy(output, targets, reduction="sum").item()
            totals += torch.tensor([loss, (output.argmax(1) == targets).sum().item(), len(targets)], dtype=torch.float64)
        if run.processes.any(stop.requested):
            return None
    loss, hits, count = run.processes.total(totals).tolist()
    return loss / count, 100 * hits / count
