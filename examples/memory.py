"""How much memory training takes: bytes that autograd saves, and the growth of the process (of the GPU's allocations on a GPU)."""

import contextlib
import copy
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIB = 2**20


def saved_bytes(model: nn.Module, images: Tensor, indices: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward on `images`, parameters and buffers not counted, each storage once.

    A copy of `model` is run, so that nothing of it changes: statistics, adaptive bits, generators.
    """
    model = copy.deepcopy(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive = []  # holding every saved tensor keeps an address from being given to a second one

    def pack(tensor):
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _forward(model, images, indices)
    del output
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(size for address, size in storages.items() if address not in own)


def warm_up(model: nn.Module, images: Tensor, indices: Tensor) -> None:
    """One step of a copy of `model`: what libraries load and set aside when they are first used is not the training's memory."""
    output = _forward(copy.deepcopy(model), images, indices)
    F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long, device=output.device)).backward()


def _forward(model, images, indices):
    if hasattr(model, "set_sample_indices"):
        model.set_sample_indices(indices)
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        return model.train()(images)


class PeakMemory:
    """Highest memory since it was made, over what there was then.

    On a GPU: of PyTorch's allocator. On a CPU: of the process's resident set, whose high-water mark Linux lets a process reset; elsewhere
    of its whole life.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.start = _status("VmRSS") or _peak_resident()

    def growth(self) -> int:
        """Bytes of the highest point above the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return max(0, (_status("VmHWM") or _peak_resident()) - self.start)


def _status(field):
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _peak_resident():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
