"""Seeds of ops that draw random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(generator: torch.Generator | None = None) -> Tensor:
    """(seed, offset) of one op's noise, from PyTorch's generator of the CPU or the given one.

    Raises:
        RuntimeError: a CUDA graph is being captured. Kernels get the two numbers with their launch, so each replay would draw the same
            noise, and errors that are to average out over steps would add up.
    """
    if not torch.compiler.is_compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("quantize: noise cannot be captured in a CUDA graph, every replay of which would draw the same")
    return torch.randint(2**63 - 1, (2,), generator=generator, device="cpu")
