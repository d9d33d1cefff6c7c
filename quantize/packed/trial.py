"""Does a capture compute what the model does? It is tried on other values than those that it was made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

CLOSE = 1e-4  # how near a capture's outputs are to the model's, of their largest: some kernels on GPUs sum in any order


def copy_of(x: Tensor) -> Tensor:
    """With the strides of `x`, whichever they are."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((length,), (1,)).clone().as_strided(x.shape, x.stride())


def other_values(inputs: list[Tensor]) -> list[Tensor]:
    """Inputs of the same kinds with other values: of floats, or where there are none, the same integers in another order."""
    floats = any(x.is_floating_point() for x in inputs)
    changed = []
    for x in inputs:
        x = copy_of(x)
        if x.numel() and (x.is_floating_point() or not floats):
            values = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
            values.copy_(values.flip(0) * 0.75 if x.is_floating_point() else values.flip(0))
        changed.append(x)
    return changed


def compare(forward: Callable[[list[Tensor]], Any], capture: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> None:
    """ValueError where `capture` gives something else than `forward` of these inputs."""
    devices = {x.device for x in inputs if x.is_cuda}
    with torch.random.fork_rng(list(devices)):
        _seed(devices)
        expected = tree_leaves(forward(list(map(copy_of, inputs))))
        _seed(devices)
        outputs = tree_leaves(capture(list(map(copy_of, inputs))))
    for index, (output, value) in enumerate(zip(outputs, expected, strict=True)):
        if not (_close(output, value) if isinstance(value, Tensor) else output == value):
            raise ValueError(
                f"capture: model must compute the same for all values of its inputs; on other values output {index} of its ops is not that "
                "of its forward"
            )


def _seed(devices: set[torch.device]) -> None:
    torch.default_generator.manual_seed(0)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _close(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    if not output.is_floating_point() or not output.numel():
        return torch.equal(output, expected)
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(output, expected, rtol=0, atol=CLOSE * largest, equal_nan=True)
