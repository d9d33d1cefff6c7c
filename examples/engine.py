"""A run and its two loops: one epoch of training, and a test."""

import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data import Loader
from interrupt import StopRequest
from nonfinite import first_nonfinite
from processes import Processes
from schedule import learning_rate


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

    Raises FloatingPointError, naming the layer, when the loss is not finite: before that step touches the weights.
    """
    args, steps = run.args, len(loader)
    run.net.train()
    times, before = [], time.perf_counter()
    title = f"epoch {run.epoch + 1}/{args.epochs}"
    # disable=None: no bar where the output is not a terminal
    bar = tqdm(total=steps, initial=run.step, desc=title, leave=False, disable=None if run.processes.first else True)
    with bar:
        for images, targets, indices in loader.epoch(run.epoch, run.step):
            for group in run.optimizer.param_groups:
                position = run.epoch + (run.step + 0.5) / steps
                group["lr"] = learning_rate(args.lr_scheduler, args.lr, position, args.epochs, args.lr_warmup_epochs, args.lr_milestones)
            train_step(run, images, targets, indices)
            now = time.perf_counter()
            times.append(now - before)
            before = now
            if run.step % args.print_freq == 0 or run.step == steps:
                loss, hits, count = run.totals.tolist()
                bar.set_postfix_str(f"loss {loss / count:.3f}, top-1 {100 * hits / count:.2f} %", refresh=False)
                bar.update(run.step - bar.n)
            if run.processes.any(stop.requested):
                return None
    return 1000 * statistics.median(times) if times else 0.0


def train_step(run: Run, images: Tensor, targets: Tensor, indices: Tensor) -> None:
    """Forward, backward and update on one batch, counted in the run's totals."""
    images, targets = show(run, images, indices), targets.to(run.processes.device)
    run.optimizer.zero_grad(set_to_none=True)
    with autocast(run):
        output = run.net(images)
        loss = F.cross_entropy(output, targets, label_smoothing=run.args.label_smoothing)
    # Both before the backward pass is queued: a GPU then works on it while the next batch is prepared.
    value, hits = loss.item(), (output.detach().argmax(1) == targets).sum().item()
    if value - value != 0:  # NaN or infinite
        with autocast(run):
            culprit = first_nonfinite(run.model, images)
        raise FloatingPointError(f"loss is {value} at step {run.step + 1} of epoch {run.epoch + 1}; {culprit}")
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1
    run.totals += torch.tensor([value * len(targets), hits, len(targets)], dtype=torch.float64)


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
