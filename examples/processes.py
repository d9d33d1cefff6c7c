"""The processes of a run: one when started by hand, several under torchrun."""

import os
from dataclasses import dataclass

import torch
from quantize import ActivationConfig, QSyncBatchNorm
from torch import Tensor, nn
from torch import distributed as dist


@dataclass
class Processes:
    """Rank and device of this process, and what the processes tell each other beside gradients."""

    rank: int
    world: int
    device: torch.device
    control: object = None  # a gloo group on every device: agreeing on a stop or a count must not wait for the GPU

    @classmethod
    def start(cls, device: str = "auto") -> "Processes":
        """Read torchrun's environment and join the others: over NCCL where each has a GPU, over gloo otherwise."""
        rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU; use --device cpu or auto")
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if on_gpu:
            torch.cuda.set_device(local)
        where = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        if world == 1:
            return cls(rank, world, where)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        return cls(rank, world, where, dist.new_group(backend="gloo"))

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values` over the processes, on the CPU."""
        values = values.cpu().clone()
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; the same answer in all."""
        return bool(self.total(torch.tensor(float(flag)))) if self.world > 1 else flag

    def gather(self, value) -> list:
        """`value` of every process, in the order of ranks, in the first one; nothing in the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else []
        dist.gather_object(value, values if self.first else None, dst=0, group=self.control)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: BatchNorm statistics differ between processes after a training step."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            dist.destroy_process_group()


def share_batch_norm(model: nn.Module) -> None:
    """Let batch norms go over the batches of all processes, in place: they then compute what one process with the joint batch would.

    To be called after DistributedDataParallel has looked at the model: on CPUs it refuses every SyncBatchNorm, ours too, which can do it.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.process_group = None  # all processes
            if hasattr(module, "compresses"):  # a compressed layer keeps its bits
                module.__class__ = QSyncBatchNorm
            else:
                QSyncBatchNorm.convert(module, ActivationConfig(enabled=False), name)
