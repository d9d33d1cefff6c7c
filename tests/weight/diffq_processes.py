"""One of two gloo processes: `python diffq_processes.py RANK WORLD FILE FOLDER`. A DiffQ model in DistributedDataParallel, two steps."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import quantize


def train(rank):
    torch.manual_seed(6)
    model = quantize.prepare(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), quantize.DiffQ(init_bits=3))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.1)
    guard = quantize.add_bit_parameters(optimizer, parallel, lr=0.1)
    torch.manual_seed(100 + rank)  # data and noise of its own
    results = []
    for step in range(3):
        optimizer.zero_grad()
        loss = parallel(torch.randn(16, 3, 5)).square().mean() + 5 * quantize.size_penalty(parallel)
        (loss * (torch.inf if step == 1 and rank == 0 else 1)).backward()  # an overflow in one process
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return results, guard.steps, guard.skipped


def main():
    rank, world, file, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.save(train(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()  # after DistributedDataParallel: see the fixture process_group


if __name__ == "__main__":
    main()
