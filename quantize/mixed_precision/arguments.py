"""What measurements take: a float model and batches of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..packed.modules import PackedLayer
from ..packed.plain import refuse_wrappers
from ..weight.prepare import check_weight, prepared_weights, tensor_names
from .replay import positional

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def check_float_model(model, who: str) -> None:
    """TypeError for what is no module or hides one, ValueError for one that is prepared or converted."""
    refuse_wrappers(model, who)
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError(f"{who}: model must be a float model; got a converted one")
    prepared = next(prepared_weights(model), None)
    if prepared is not None:
        raise ValueError(f"{who}: model must be a float model; {prepared.name!r} is prepared")


def check_weights(model: nn.Module, names: Iterable[str], who: str) -> None:
    """ValueError or TypeError for weights of the modules named that cannot be quantized."""
    for name in names:
        module = model.get_submodule(name)
        for tensor in tensor_names(module):
            check_weight(name, module, tensor, who)


def check_inputs(inputs, who: str, name: str, number: int | None = None) -> None:
    """TypeError or ValueError if a batch's `inputs` hold no tensors, empty ones, or such as are not finite. `number`: of the batch."""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else list(positional(inputs))
    tensors = [value for value in values if isinstance(value, Tensor)]
    must, which = ("be", "") if number is None else ("hold inputs that are", f", number {number}")
    if values and not tensors:
        raise TypeError(f"{who}: {name} must {must} Tensors; got {type(values[0]).__name__}{which}")
    odd = next((t for t in tensors if t.is_meta or t.layout in SPARSE), None)
    if odd is not None:
        found = "one on meta" if odd.is_meta else odd.layout
        raise TypeError(f"{who}: {name} must {must} dense Tensors with values; got {found}{which}")
    if number is not None and tensors and not tensors[0].dim():  # whose length is the number of samples
        raise ValueError(f"{who}: {name} must {must} Tensors of samples; got one without dimensions{which}")
    if any(not t.numel() for t in tensors) or not tensors:
        raise ValueError(f"{who}: {name} must hold samples; got an empty one{which}")
    if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
        found = "got NaN or infinite ones" if number is None else f"number {number} holds NaN or infinite inputs"
        raise ValueError(f"{who}: {name} must be finite; {found}")


def checked_batches(batches, metric: str, who: str) -> list[tuple]:
    """(inputs, targets) pairs as a list. TypeError or ValueError for anything else."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"{who}: batches must be an iterable of (inputs, targets) pairs; got {type(batches).__name__}")
    batches = list(batches)
    if not batches:
        raise ValueError(f"{who}: batches must hold at least one (inputs, targets) pair; got none")
    wrong = [type(b).__name__ for b in batches if not isinstance(b, (tuple, list)) or len(b) != 2]
    if wrong:
        raise TypeError(f"{who}: batches must hold (inputs, targets) pairs; got {wrong[0]}")
    for number, (inputs, targets) in enumerate(batches):
        check_inputs(inputs, who, "batches", number)
        if metric == "loss" and targets is None:
            raise TypeError(f'{who}: batches must hold targets for metric "loss"; number {number} has None')
    return batches
