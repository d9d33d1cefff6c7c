"""Batch norms whose statistics are those of the quantized network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..calls import call
from ..checks import check_module, first_of
from ..modes import evaluating

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable) -> nn.Module:
    """Replaces all running means and variances by their averages over `batches`, as the network in evaluation sees them. In place.

    Few bits amplify small steps of the weights, and running averages of training lag behind them: evaluated with these, a network of 1 or
    2 bits may be far worse than it is. The same batches give the same statistics again; nothing of before is left in them, except where the
    forward pass does not reach a norm. Batches count alike whatever their size. Everything but batch norms is in evaluation mode meanwhile,
    without dropout or noise. Every process of a distributed run has statistics of its own batches.

    Args:
        model: any nn.Module.
        batches: inputs (Tensor[N, ...], or a tuple or list whose first item is one, or a mapping of the model's arguments by name).

    Returns:
        The same object, its training flags and momentums as before.

    Raises:
        TypeError: naming the argument.
        ValueError: no batches. What went wrong leaves the old statistics in place.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
        >>> model = quantize.reestimate_batch_norm(model, batches)
        >>> means = torch.stack([model[0](batch).mean((0, 2, 3)) for batch in batches])
        >>> torch.allclose(model[1].running_mean, means.mean(0), atol=1e-5)
        True
    """
    check_module("reestimate_batch_norm", model)
    if not isinstance(batches, Iterable):
        raise TypeError(f"reestimate_batch_norm: batches must be iterable; got {type(batches).__name__}")
    if isinstance(batches, Tensor):  # whose rows would be taken for batches
        raise TypeError(f"reestimate_batch_norm: batches must be an iterable of inputs, as [inputs]; got one Tensor{list(batches.shape)}")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and isinstance(m.running_mean, Tensor)]
    momentums = [norm.momentum for norm in norms]
    before = [[getattr(norm, name).clone() for name in STATISTICS] for norm in norms]
    count = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            for batch in batches:
                call(model, first_of("reestimate_batch_norm", batch, count))
                count += 1
        if not count:
            raise ValueError("reestimate_batch_norm: batches must hold something; got nothing")
        for norm in norms:
            if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
                name = next(name for name, m in model.named_modules() if m is norm)
                raise ValueError(f"reestimate_batch_norm: batches must be finite in all batch norms; those of {name!r} are not")
        for norm, values in zip(norms, before, strict=True):
            if not norm.num_batches_tracked:
                _set(norm, values)
    except BaseException:
        for norm, values in zip(norms, before, strict=True):
            _set(norm, values)
        raise
    finally:
        for norm, momentum in zip(norms, momentums, strict=True):
            norm.momentum = momentum
    return model


def _set(norm: nn.Module, values: list[Tensor]) -> None:
    for name, value in zip(STATISTICS, values, strict=True):
        getattr(norm, name).copy_(value)
