"""What becomes of a network whose layers have been assigned bits: prepared, tested, fine-tuned, packed, loaded back and tested again."""

import copy
import hashlib
import json
import random
import signal
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import quantize
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import checkpoint
import data
import files
import train
from engine import Run, reestimate, test
from interrupt import StopRequest
from models import create_model
from processes import Processes


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; what was done so far is kept."""

    def __init__(self, number: int | None):
        super().__init__(number)
        self.signal = number or signal.SIGTERM  # none: another process was asked


class Interrupts(StopRequest):
    """For work without steps: the first request raises Stopped where it finds the program."""

    def _ask(self, number, frame):
        first = self.signal is None
        super()._ask(number, frame)
        if first:
            raise Stopped(number)


def fine_tune(plain: nn.Module, config: dict, batches: list, recipe: Namespace, processes: Processes, loaders, folder: Path) -> dict:
    """Numbers of the model that `config` makes of `plain`, whose weights stay as they are.

    `batches` are what it is calibrated and compared with `plain` on, `loaders` those of training and of the test. One that was
    interrupted in `folder` goes on. Raises Stopped.
    """
    model = quantize.prepare(copy.deepcopy(plain).eval(), config)
    if any(own is not None and own.activation_bits for own in config.values()):
        quantize.calibrate(model, [images for images, _ in batches])
    result = {"true_kl": divergence(plain, model, batches)}
    # The name is the checkpoint's protection: it is not taken for one of train.py's, nor for another assignment's.
    own = {"workspace": folder, "weights": "mixed", "weight_bits": folder.name, "init_from": None}
    run = train.begin(Namespace(**{**vars(recipe), **own}), processes, model)
    with StopRequest() as stop:
        reestimate(run, loaders[0])
        before = test(run, loaders[1], stop)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(recipe.seed + 1 + processes.rank)
        last = folder / "last.pt"
        if processes.any(last.exists()):
            checkpoint.restore(run, checkpoint.read(last, run.args, "--workspace"))
        try:
            finished = before is not None and train.train(run, *loaders, stop)
        except FloatingPointError as error:  # of this assignment only
            return result | {"top1_before": before[1], "failed": str(error)}
    if not finished:
        raise Stopped(stop.signal)
    return result | {"top1_before": before[1]} | (packed(run, loaders[1], folder) if processes.first else {})


def packed(run: Run, test_loader, folder: Path) -> dict:
    """Numbers of the file that the training has left in `folder`, whose checkpoints are of no more use."""
    report = json.loads((folder / "report.json").read_text())
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    result = {"top1_after": report["last_top1"], "bit_ops": report["bit_ops"]}
    if report["not_packed"]:
        return result | {"failed": report["not_packed"]}
    file, args, part = Path(report["file"]), run.args, test_loader.data
    model = quantize.load(create_model(args.arch, args.num_classes, part.channels, args.width), file).to(run.processes.device)
    sizes = {"file": str(file), "file_bytes": report["file_bytes"], "stored_bytes": quantize.size_report(model).bytes}
    alone = Processes(0, 1, run.processes.device)
    loader = data.Loader(part, args.batch_size, train=False)
    return result | sizes | {"top1_packed": test(Run(args, alone, model, model, None, None), loader, StopRequest())[1]}


@torch.no_grad()
def divergence(plain: nn.Module, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """KL(plain || model) of the outputs in nats, mean over the images."""
    total = count = 0
    for images, _ in batches:
        reference, other = (F.log_softmax(network(images).double(), 1) for network in (plain, model))
        total += float(F.kl_div(other, reference, reduction="sum", log_target=True))
        count += len(images)
    return total / count


def key_of(*settings) -> str:
    """A word for what decides about a result."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def digest(tensors: Iterable[Tensor]) -> str:
    """A word for their content."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def kept(file: Path, processes: Processes, make) -> dict:
    """What an earlier call has left in `file`, or what `make` returns, in every process the first one's."""
    if not processes.any(processes.first and file.exists()):
        found = make()
        if processes.first:
            files.write(file, json.dumps(found, indent=1) + "\n")
    return shared(processes, lambda: json.loads(file.read_text()))


def shared(processes: Processes, make):
    """What `make` returns in the first process, in all of them."""
    values = [make() if processes.first else None]
    if processes.world > 1:
        dist.broadcast_object_list(values, src=0, group=processes.control)
    return values[0]
