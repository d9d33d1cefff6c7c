"""What `train.py --evaluate` prints: a checkpoint's accuracy or, with `--training-only`, the variance of its gradient."""

import math
from functools import partial
from itertools import islice

import torch
from quantize import variance_report
from torch.nn import functional as F

import checkpoint
from engine import Run, autocast, reestimate, show, test
from interrupt import StopRequest
from said import blaming


def report(run: Run, train_loader, test_loader) -> dict:
    """Print and return the numbers on the checkpoint that `run` was restored from."""
    if run.args.training_only:
        if run.args.resume2:
            second = checkpoint.read(run.args.resume2, run.args, "--resume2")
            if second["ranks"][0]["activation"] is None:
                raise ValueError(f"--resume2: expected a run with compressed activations; {run.args.resume2} is of one without")
            with blaming(second["where"], KeyError, RuntimeError, TypeError, ValueError):
                checkpoint.load_activation_state(run.model, second["ranks"][0]["activation"])
        numbers = variances(run, train_loader)
        text = "  ".join(f"{name} {value:.6g}" for name, value in numbers.items())
    else:
        reestimate(run, train_loader)
        loss, top1 = test(run, test_loader, StopRequest())
        numbers = {"test_loss": loss, "test_top1": top1}
        text = f"test loss {loss:.4f}  top-1 {top1:.2f} %"
    if not all(map(math.isfinite, numbers.values())):
        broken = [name for name, value in run.model.state_dict().items() if value.is_floating_point() and not torch.isfinite(value).all()]
        cause = f"{broken[0]} in it is not finite" if broken else "its weights are finite"
        raise FloatingPointError(f"{run.args.resume}: {text}; {cause}")
    if run.processes.first:
        print(f"{run.args.resume}: {text}")
    return numbers


def variances(run: Run, loader) -> dict:
    """Overall, Quant and Sample variance of the gradient over the first `--batches` training batches, `--draws` draws each.

    A step's gradient is the mean over the processes, whose batches and noise are their own: its variance is a process's over their number.
    """
    run.model.train()
    batches = [(show(run, images), targets.to(run.processes.device)) for images, targets, _ in islice(loader.epoch(0), run.args.batches)]
    if len(batches) < run.args.batches:
        raise ValueError(f"--batches: expected at most the {len(batches)} of an epoch; got {run.args.batches}")
    with autocast(run):
        report = variance_report(run.model, batches, partial(F.cross_entropy, label_smoothing=run.args.label_smoothing), run.args.draws)
    mean = run.processes.total(torch.tensor([report.quantization, report.sample], dtype=torch.float64)) / run.processes.world
    quantization, sample = (mean / run.processes.world).tolist()
    return {"Overall": quantization + sample, "Quant": quantization, "Sample": sample}
