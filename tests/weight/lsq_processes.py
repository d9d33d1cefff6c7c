"""One of two gloo processes: `python lsq_processes.py RANK WORLD FILE FOLDER`. Quantizers that start from or calibrate on half the data."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import quantize
from quantize.weight.lsq import METHODS, ActivationQuantizer

# name: samples of each process
CASES = {"equal": (40, 40), "unequal": (70, 10), "one has zeros only": (40, 40), "after a ReLU": (40, 40), "one has none": (0, 40)}


def joint(name):
    """The data of all processes together: the same in each."""
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(sum(CASES[name]), 3, 5, generator=generator) * torch.linspace(0.5, 2, sum(CASES[name]))[:, None, None]
    if name == "one has zeros only":
        x[CASES[name][0] :] = 0
    return x.relu() if name == "after a ReLU" else x


def share(name, rank):
    first = sum(CASES[name][:rank])
    return joint(name)[first : first + CASES[name][rank]]


def started(x):
    quantizer = ActivationQuantizer(4)
    quantizer(x)
    return quantizer.state_dict()


def calibrated(batches, method):
    torch.manual_seed(5)
    model = quantize.prepare(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), quantize.Uniform(8, 4))
    quantize.calibrate(model, batches, method)
    return {key: value for key, value in model.state_dict().items() if "activation_quantizer" in key}


def trained(name, rank):
    """Two steps of a prepared model in DistributedDataParallel; rank None: alone, with the joint batch."""
    torch.manual_seed(6)
    model = quantize.prepare(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), quantize.PowerOfTwo(4, True, 4))
    parallel = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = joint(name) if rank is None else share(name, rank)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def reported(rank):
    """The first process reports and evaluates, the second does not; then both train."""
    torch.manual_seed(7)
    model = quantize.prepare(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), quantize.Uniform(8, 4))
    if rank == 0:
        x = joint("unequal")
        quantize.memory_report(model, x)
        quantize.variance_report(model, [(x, x)], lambda y, _: y.sum(), draws=1)
        quantize.summary(model, x)
        model.eval()(x)
        data = [(x.flatten(1), torch.zeros(len(x), dtype=torch.long))]
        plain = nn.Sequential(nn.Linear(15, 2))
        sensitivity = quantize.Sensitivity(["0"], [(4, 4)], torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
        quantize.measure_latency(plain, data[0][0], sensitivity, repeats=1)
    assert not model[0].activation_quantizer.initialized
    model.train()(share("equal", rank))
    return model[0].activation_quantizer.state_dict()


def main():
    rank, world, file, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {"trained": trained("equal", rank), "reported": reported(rank)}
    for name in CASES:
        results[name] = {"start": started(share(name, rank))}
        for method in METHODS:
            results[name][method] = calibrated(share(name, rank).split(16), method)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
