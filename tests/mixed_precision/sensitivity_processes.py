"""One of several gloo processes: `python sensitivity_processes.py RANK WORLD FILE FOLDER`. Measures, and saves what came out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sensitivity_models import Residual, images, trained

import quantize

CHOICES = [(2, None), (3, 4)]
CASES = {  # name: (method, metric, what else)
    "gauss_newton kl": ("gauss_newton", "kl", {}),
    "gauss_newton loss": ("gauss_newton", "loss", {}),
    "composed": ("composed", "kl", {}),
    "clado kl": ("clado", "kl", {}),
    "diagonal kl": ("diagonal", "kl", {}),
    "own loss": ("diagonal", "loss", {"loss_fn": lambda z, y: (z - y[:, None]).square().mean()}),
    "one layer": ("clado", "kl", {"skip": "conv*"}),
    "groups": ("gauss_newton", "kl", {"groups": {"stage": "conv*"}}),
}
FEW = ("gauss_newton loss", "clado kl", "one layer")  # of three processes
STOPPED = (("clado kl", False), ("gauss_newton kl", False), ("gauss_newton kl", True), ("composed", False))  # whether one file is lost
LAYERS = 3


def setting():
    torch.manual_seed(3)
    return trained(Residual()), images(5, 3, 4)


def measure(name, **more):
    model, batches = setting()
    method, metric, others = CASES[name]
    return quantize.measure_sensitivity(model, batches, CHOICES, method, metric, progress=False, **others, **more)


class Stop(Exception):
    pass


def interrupted(method, at, checkpoint):
    """Stopped at a call of the last layer."""
    model, batches = setting()
    count = [0]

    def hook(*args):
        count[0] += 1
        if count[0] == at:
            raise Stop

    model.fc.register_forward_hook(hook)
    try:
        quantize.measure_sensitivity(model, batches, CHOICES, method, checkpoint=checkpoint, progress=False)
    except Stop:
        return True
    return False


def second_batch(rank, world):
    """The first pass of the second of three batches: MACs, two rounds of steps, the trial of what is left out, the first batch."""
    return 1 + 2 * 3 + (1 + 2 * LAYERS) + 1 + 2 * len(range(rank, LAYERS, world)) + 1


def refused(rank, change):
    """The message where the last process is given something else."""
    model, batches = setting()
    if rank == dist.get_world_size() - 1:
        change(model, batches)
    try:
        quantize.measure_sensitivity(model, batches, CHOICES, progress=False)
    except ValueError as error:
        return str(error)


def more_samples(model, batches):
    batches[1] = tuple(torch.cat([t, t]) for t in batches[1])


def other_weight(model, batches):
    model.fc.weight.data[0, 0] += 1e-3


def main():
    rank, world, file, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for name in CASES if world == 2 else FEW:
        measure(name).save(folder / f"{name} {rank}")
    if world == 2:
        stopped_and_refused(rank, world, folder)
    dist.destroy_process_group()


def stopped_and_refused(rank, world, folder):
    text = {"batches": refused(rank, more_samples), "model": refused(rank, other_weight)}
    checkpoint = folder / "checkpoint"
    for name, lost in STOPPED:
        at = second_batch(rank, world) + (4 * (world - rank) if name == "clado kl" else 0)  # at different places
        text[f"stopped {name} {lost}"] = interrupted(name.split()[0], at, checkpoint)
        own = folder / f"checkpoint.{rank}-of-{world}"
        text[f"there {name} {lost}"] = own.exists()
        if lost and rank == 0:
            own.unlink()
        measure(name, checkpoint=checkpoint).save(folder / f"resumed {name} {lost} {rank}")
        text[f"gone {name} {lost}"] = not own.exists()
    interrupted("gauss_newton", second_batch(rank, world), checkpoint)
    if rank == 0:
        own = folder / f"checkpoint.0-of-{world}"
        own.write_bytes(own.read_bytes()[:-1])
    try:
        measure("gauss_newton kl", checkpoint=checkpoint)
    except ValueError as error:
        text["damaged"] = str(error)
    torch.save(text, folder / f"text {rank}")


if __name__ == "__main__":
    main()
