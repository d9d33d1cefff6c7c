#!/usr/bin/env python3
"""Train an image classifier, plain, with compressed activations, with low-bit weights or both, by hand or under torchrun:

    python examples/train.py --arch resnet20 --dataset mnist5k -c quantize --cabits 2
    python examples/train.py --arch resnet20 --dataset mnist5k --weights po2plus --weight-bits 4 --init-from runs/.../last.pt
    python examples/train.py --arch resnet20 --dataset mnist5k --weights diffq --group-size 8 --penalty 5
    python examples/train.py --arch resnet20_q --dataset mnist5k --weights xnor
    torchrun --nproc-per-node=4 examples/train.py --arch resnet50 --dataset imagenet --data-path DATA -c quantize --amp bf16

Ctrl-C writes a checkpoint after the step in flight; `--resume runs/.../last.pt` with the same flags continues to the same numbers.
"""

import math
import random
import signal
import sys
import time

import numpy as np
import quantize
import torch
from torch import nn

import checkpoint
import data
import learned_bits
import options
import outcome
import weights
from engine import Run, autocast, reestimate, show, test, train_epoch
from interrupt import StopRequest
from logs import Logs
from memory import MIB, PeakMemory, saved_bytes, warm_up
from models import create_model, default_width
from processes import Processes, share_batch_norm
from report import report
from said import blaming, said


def main(argv: list[str] | None = None) -> int:
    """Train (or evaluate) as `argv` says; 0, or 128 plus the signal that stopped it."""
    args = options.parse(argv)
    processes = Processes.start(args.device)
    try:
        return work(args, processes)
    finally:
        processes.close()  # after DistributedDataParallel, which went with work(): a group that it alone keeps may wait for ever as it ends


def work(args, processes: Processes) -> int:
    """What main() does as one of the processes."""
    run, train_loader, test_loader = prepare(args, processes)
    if args.evaluate:
        report(run, train_loader, test_loader)
        return 0
    last = args.workspace / "last.pt"
    if not (args.resume or args.overwrite) and processes.any(last.exists()):
        text = f"--workspace: {args.workspace} holds a run; go on with it (--resume {last}), name another folder, or lose it (--overwrite)"
        raise ValueError(text)
    with StopRequest() as stop:
        if train(run, train_loader, test_loader, stop):
            return 0
    if processes.first:
        print(f"stopped after step {run.step} of epoch {run.epoch + 1}; continue with --resume {last}")
    return 128 + (stop.signal or signal.SIGTERM)


def prepare(args, processes: Processes):
    """Data loaders and a run at its beginning, or where `--resume` left it."""
    torch.use_deterministic_algorithms(args.deterministic)
    parts = data.load(args.dataset, args.data_path, args.image_size)
    parts = [data.Subset(part, limit) if limit else part for part, limit in zip(parts, (args.limit_train, args.limit_test), strict=True)]
    if len(parts[0]) < processes.world:
        raise ValueError(f"--limit-train: expected an image for each of {processes.world} processes at least; got {len(parts[0])}")
    train_loader, test_loader = (
        data.Loader(
            part,
            args.batch_size,
            train,
            seed=args.seed,
            rank=processes.rank,
            world=processes.world,
            workers=args.num_workers,
            pin=processes.device.type == "cuda",
        )
        for part, train in zip(parts, (True, False), strict=True)
    )
    args.width = args.width or default_width(args.arch)
    args.num_classes = args.num_classes or parts[0].classes
    if args.num_classes < parts[0].classes:
        raise ValueError(f"--num-classes: expected at least the {parts[0].classes} of {args.dataset}; got {args.num_classes}")

    # The same weights in every process; noise of its own in each.
    torch.manual_seed(args.seed)
    model = create_model(args.arch, args.num_classes, parts[0].channels, args.width).to(processes.device)
    if args.init_from and not args.resume:
        checkpoint.load_weights(model, checkpoint.read(args.init_from, args, "--init-from", full_precision=True))
    if args.weights:
        model = weights.prepare(model, args)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    run = begin(args, processes, model)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed + 1 + processes.rank)
    if args.resume:
        checkpoint.restore(run, checkpoint.read(args.resume, args))
    return run, train_loader, test_loader


def begin(args, processes: Processes, model: nn.Module) -> Run:
    """A run of `model`, whose weights are as they will be trained, at its beginning."""
    config = options.compression(args, model)
    if config is not None:
        model = quantize.QModule(model, config)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
    net = nn.parallel.DistributedDataParallel(model) if processes.world > 1 else model
    if args.sync_bn and processes.world > 1:
        share_batch_norm(model)
    optimizer, bits = learned_bits.make_optimizers(args, net)
    return Run(args, processes, model, net, optimizer, scaler, bits=bits)


def train(run: Run, train_loader, test_loader, stop: StopRequest) -> bool:
    """All epochs that are left; False if a stop was asked for before the end, after writing a checkpoint."""
    args, first = run.args, run.processes.first
    if first:
        with blaming("--workspace: expected a folder that can be written to", OSError):
            args.workspace.mkdir(parents=True, exist_ok=True)
            if args.resume:
                outcome.take_over(run, args.resume)
            logs = Logs(args.workspace, run.epoch)  # before anything is removed: it may be damaged
            outcome.clear(args.workspace, checkpoints=run.epoch == run.step == 0)
    images, _, indices = next(train_loader.epoch(0))
    example = show(run, images[:2]), indices[:2]
    with autocast(run):
        warm_up(run.model, *example)
        check_single(run, train_loader, *example)
    peak = PeakMemory(run.processes.device)
    while run.epoch < args.epochs:
        began = time.perf_counter() - run.seconds
        step_ms, tested = train_epoch(run, train_loader, stop), None
        if step_ms is not None and not args.training_only:
            reestimate(run, train_loader)
            tested = test(run, test_loader, stop)
        if step_ms is not None:
            check_finite(run, tested)
        if step_ms is None or (tested is None and not args.training_only):
            run.seconds = time.perf_counter() - began
            checkpoint.save(run, args.workspace / "last.pt")
            return False
        entry = describe(run, step_ms, tested, time.perf_counter() - began, peak, example)
        run.epoch, run.step, run.seconds, run.times = run.epoch + 1, 0, 0.0, []
        run.totals.zero_()
        is_best = tested is not None and tested[1] > run.best
        run.best = tested[1] if is_best else run.best
        # The log before the checkpoint: a run killed in between resumes before this epoch and writes its entry anew.
        if first:
            logs.write(entry)
            print(summary(entry, args.epochs), flush=True)
        # The last one last: a run killed before it repeats the epoch and writes the others anew.
        for name in ["best.pt"] * is_best + [f"epoch-{run.epoch:04d}.pt"] * args.gather_checkpoints + ["last.pt"]:
            checkpoint.save(run, args.workspace / name)
    if first:
        logs.close()
        if run.skipped:
            steps = args.epochs * len(train_loader)
            print(f"{run.skipped} of {steps} steps were skipped, their gradients not being finite: weights or bits stayed as they were")
        outcome.finish(run, example[0][:1])
    return True


def check_single(run: Run, loader, images, indices) -> None:
    """ValueError if an epoch has a batch of one image that the model cannot train on, now rather than at the end of that epoch."""
    if min(map(len, loader.plan(0))) > 1:
        return
    try:
        warm_up(run.model, images[:1], indices[:1])
    except ValueError as error:
        text = f"--batch-size: expected a size other than {loader.batch_size}, with which a batch of an epoch has a single image"
        raise ValueError(f"{text}: {error}") from error


def check_finite(run: Run, tested: tuple[float, float] | None) -> None:
    """FloatingPointError if the epoch's last step broke the weights, before they replace those of the checkpoint."""
    broken = [name for name, p in run.model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise FloatingPointError(f"{broken[0]} is not finite after epoch {run.epoch + 1}; the checkpoint is of before it")
    if tested is not None and not math.isfinite(tested[0]):
        raise FloatingPointError(f"test loss is {tested[0]} after epoch {run.epoch + 1}; the checkpoint is of before it")


def describe(run: Run, step_ms, tested, seconds, peak: PeakMemory, example) -> dict:
    """The log entry of the epoch just finished."""
    loss, hits, count = run.processes.total(run.totals).tolist()
    peak_mib = peak.growth() / MIB  # before the measurement below, which is no part of training
    with autocast(run):
        saved = saved_bytes(run.model, *example) / len(example[0])
    return {
        "epoch": run.epoch,
        "train_loss": loss / max(count, 1),  # without the steps that overflowed, which may be all
        "train_top1": 100 * hits / max(count, 1),
        "test_loss": tested and tested[0],
        "test_top1": tested and tested[1],
        "lr": run.optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "step_ms": step_ms,
        "saved_mib_per_image": saved / MIB,
        "peak_mib": peak_mib,
        "skipped_steps": run.skipped,  # since the beginning
        **(learned_bits.numbers(run.model) if run.bits else {}),
    }


def summary(entry: dict, epochs: int) -> str:
    """A line for the terminal."""
    tested = "" if entry["test_top1"] is None else f"  test loss {entry['test_loss']:.4f} top-1 {entry['test_top1']:.2f} %"
    size = f"  file {entry['size_mib']:.3f} MiB, {entry['bits']:.2f} bits (its header not counted)" if "bits" in entry else ""
    skipped = f"  skipped {entry['skipped_steps']}" if entry["skipped_steps"] else ""
    return (
        f"epoch {entry['epoch'] + 1:>{len(str(epochs))}}/{epochs}  train loss {entry['train_loss']:.4f} top-1 {entry['train_top1']:.2f} %"
        f"{tested}  {entry['seconds']:.1f} s  step {entry['step_ms']:.0f} ms  saved {entry['saved_mib_per_image']:.3f} MiB/image"
        f"{size}{skipped}"
    )


if __name__ == "__main__":
    sys.exit(said(main))
