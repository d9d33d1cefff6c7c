"""Batches of a data set, in an order that is a function of (seed, epoch) alone, so that a resumed run sees what it would have seen."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Subset:
    """The first part of the interface of a data set over `count` of its images, evenly spread over it."""

    def __init__(self, data, count: int):
        self.data, self.classes, self.channels = data, data.classes, data.channels
        self.indices = torch.linspace(0, len(data) - 1, min(count, len(data))).round().long()

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor, draw: int | None = None) -> tuple[Tensor, Tensor]:
        return self.data.batch(self.indices[indices], draw)


class Loader:
    """Batches of `batch_size` for one of `world` processes: `(images, targets, indices)`.

    Training shuffles and augments; every process gets the same number of batches of the same sizes, so up to `world - 1` images are left
    out of an epoch. Without `train`, every image is seen by exactly one process and none twice; the last batch of some may be empty.
    `workers` processes prepare batches ahead (0: none), and `pin` puts them into page-locked memory.
    """

    def __init__(self, data, batch_size: int, train: bool, seed=0, rank=0, world=1, workers=0, pin=False):
        self.data, self.batch_size, self.train, self.seed = data, batch_size, train, seed
        self.rank, self.world, self.workers, self.pin = rank, world, workers, pin

    def __len__(self) -> int:
        count = len(self.data) // self.world * self.world if self.train else len(self.data)
        return -(-count // (self.batch_size * self.world))

    def plan(self, epoch: int) -> list[Tensor]:
        """Indices of every batch of this process in `epoch`."""
        order = torch.arange(len(self.data))
        if self.train:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch, 0))
            order = torch.randperm(len(self.data), generator=generator)[: len(self.data) // self.world * self.world]
        return [batch[self.rank :: self.world] for batch in order.split(self.batch_size * self.world)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of `epoch` from number `start` on."""
        draw = _mix(self.seed, epoch, 1) if self.train else None
        batches = _Batches(self.data, self.plan(epoch)[start:], draw)
        # A generator of its own: DataLoader would otherwise draw from the default one, and move the noise of a resumed run.
        yield from DataLoader(batches, batch_size=None, num_workers=self.workers, pin_memory=self.pin, generator=torch.Generator())


class _Batches(Dataset):
    """Item k is batch k, made whole by one worker."""

    def __init__(self, data, plan, draw):
        self.data, self.plan, self.draw = data, plan, draw

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, step):
        return *self.data.batch(self.plan[step], self.draw), self.plan[step]


def _mix(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
