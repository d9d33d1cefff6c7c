"""One of two gloo processes: `python sync_batch_norm_processes.py RANK WORLD FILE FOLDER`. Runs the cases and writes what came out."""

import contextlib
import math
import sys

import torch
import torch.distributed as dist
from exact_levels import EPS, ONE_BIT, exact_norms

import quantize

CASES = {  # name: (batch of each process, shape of a sample, layer's arguments)
    "equal": ((4, 4), (3, 5, 6), {}),
    "unequal": ((5, 2), (3, 5, 6), {}),
    "one empty": ((4, 0), (3, 5, 6), {}),
    "first empty": ((0, 4), (3, 5, 6), {}),
    "one value each": ((1, 1), (3,), {}),
    "two dimensions": ((6, 4), (20,), {}),
    "no affine": ((3, 5), (3, 5), {"affine": False}),
    "cumulative momentum": ((3, 4), (3, 5, 6), {"momentum": None}),
    "no running statistics": ((3, 4), (3, 5, 6), {"track_running_stats": False}),
    "frozen weight": ((3, 4), (3, 5, 6), {}),
    "far from zero": ((3, 4), (3, 5, 6), {}),
    "two bits": ((64, 32), (3, 8, 8), {"config": quantize.ActivationConfig(bits=2, max_bits=2)}),
    "double": ((5, 2), (3, 5, 6), {}),
    "disabled": ((5, 2), (3, 5, 6), {"config": quantize.ActivationConfig(enabled=False)}),
}


def joint(name):
    """(x, gradient of the output) of all processes together: the same in each."""
    batches, sample, _ = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    shape = (sum(batches), *sample)
    # Per channel as many values one above an integer as one below it: what exact_norms packs exactly.
    signs = torch.rand(sample[0], sum(batches) * math.prod(sample[1:]), generator=generator).argsort(1) % 2 * 2.0 - 1
    x = signs + torch.randint(-4, 5, (sample[0], 1), generator=generator) + (1024 if name == "far from zero" else 0)
    x = x.view(sample[0], shape[0], *sample[1:]).transpose(0, 1).contiguous()
    dtype = torch.float64 if name == "double" else torch.float32
    return x.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def layer(name, cls, **more):
    batches, sample, kwargs = CASES[name]
    module = cls(sample[0], eps=EPS, **{k: v for k, v in kwargs.items() if k != "config"}, **more)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 1.5, sample[0]))
        module.weight.requires_grad_(name != "frozen weight")
    return module.double() if name == "double" else module


def energies(rows, cls):
    """(figures that the backward reports, sum of squares of the input's gradient) of `rows` of an input of two values, which one bit
    keeps as it is."""
    grad = torch.randn(7, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    x = joint("unequal")[0]
    model = quantize.QModule(torch.nn.Sequential(cls(3, eps=0.0)), quantize.ActivationConfig(bits=1, max_bits=2))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(0.5, 1.5, 3))
    x = x[rows].clone().requires_grad_()
    with exact_norms():
        model(x).backward(grad[rows])
    return model[0]._state.records[0].energies[0], x.grad.square().sum()


def settled():
    """State of a model with a synchronized batch norm after a few steps."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SyncBatchNorm(8), torch.nn.Sigmoid(), torch.nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[3].weight.mul_(30)  # much gradient for what is before it
    model = quantize.QModule(model)
    for _ in range(4):
        model(torch.randn(8, 3, 16, 16)).square().mean().backward()
    return model.activation_state()


def main():
    rank, world, file, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {}
    for name, (batches, _, kwargs) in CASES.items():
        torch.manual_seed(7 + rank)
        module = layer(name, quantize.QSyncBatchNorm, config=kwargs.get("config", ONE_BIT))
        first = sum(batches[:rank])
        x, grad = (t[first : first + batches[rank]] for t in joint(name))
        for _ in range(2):
            x = x.detach().clone().requires_grad_()
            module.zero_grad()
            with exact_norms() if name != "two bits" else contextlib.nullcontext():
                y = module(x)
            y.backward(grad)
        for p in module.parameters():
            if p.requires_grad:
                dist.all_reduce(p.grad)
        gradients = {n: p.grad for n, p in module.named_parameters()}
        module.eval()
        results[name] = (y.detach(), x.grad, gradients, dict(module.named_buffers()), module(x).detach())
    results["energy"] = energies(slice(0, 5) if rank == 0 else slice(5, 7), torch.nn.SyncBatchNorm)
    results["settled"] = settled()
    try:
        quantize.QSyncBatchNorm(3)(torch.randn(1 if rank == 0 else 0, 3))
    except ValueError as error:
        results["too few"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
