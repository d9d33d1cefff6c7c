"""The size of a model with learned bits as a differentiable number."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from .. import _C
from ..checks import check_module, check_number
from .diffq import DiffQQuantizer, diffq_quantizers, total_bits

MIB = 1 << 20
SMOOTH = 0.01  # within this part of the target the penalty is quadratic, so that the size comes to rest

_others: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, int]] = weakref.WeakKeyDictionary()


def size_penalty(model: nn.Module, target_size: float | None = None) -> Tensor:
    """The payload of the file that the model would be saved to, in MiB, as a function of its learned bits; to be added to the loss.

    In training it counts the bits of the noise, in evaluation the rounded ones of the file: then it is ``size_report(model).bytes`` to
    within a byte a tensor, without the file's header. Everything else is a constant, found by converting a copy at the first call and again
    when tensors come or go; what later keeps a batch norm from being folded, such as a hook, is not seen. No other call waits for the
    device, and none raises because of values: a logit that is NaN counts as max_bits, without a gradient.

    Args:
        model: prepared with :class:`quantize.DiffQ`, DistributedDataParallel around it or not.
        target_size: MiB. If given, the result is instead a penalty for missing that size, ``|size / target_size - 1|`` of the rounded
            bits (quadratic within 1 %): with a weight of 10 or more the size ends there, from either side, unless a single group is so
            large that one bit of it is more than that.

    Returns:
        float32 scalar on the bits' device.

    Raises:
        TypeError: naming the argument.
        ValueError: no learned bits, or a `target_size` that min_bits does not allow: it says the least.

    Example:
        >>> model = quantize.prepare(nn.Linear(1024, 1024, bias=False), quantize.DiffQ(init_bits=8))
        >>> loss = 5 * quantize.size_penalty(model)
        >>> round(float(loss), 3)  # 1 MiB of codes, 64 KiB of bits a group, 8 KiB of ranges; times 5
        5.352
        >>> round(float(quantize.size_penalty(model, target_size=0.5)), 2)
        1.14
    """
    check_module("size_penalty", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    quantizers = list(diffq_quantizers(model))
    if not quantizers:
        raise ValueError("size_penalty: model must have learned bits; call quantize.prepare(model, quantize.DiffQ()) first")
    constant = _other_bytes(model, quantizers) / MIB
    if target_size is None:
        return total_bits(quantizers, not model.training) / (8 * MIB) + constant
    _check_target(target_size, constant, quantizers)
    missed = (total_bits(quantizers, True) / (8 * MIB) + constant) / target_size - 1
    return nn.functional.huber_loss(missed, torch.zeros_like(missed), delta=SMOOTH) / SMOOTH


def _check_target(target_size, constant: float, quantizers: list[DiffQQuantizer]) -> None:
    check_number("size_penalty", "target_size", target_size, expected="a number of MiB")
    least = constant + sum(q.numel * math.ceil(q.config.min_bits) for q in quantizers) / (8 * MIB)
    if not target_size >= least:
        raise ValueError(
            f"size_penalty: target_size must be at least {least:.4f} MiB, the size with min_bits everywhere; got {target_size!r}"
        )


def _other_bytes(model: nn.Module, quantizers: list[DiffQQuantizer]) -> int:
    """Bytes of the saved model without the codes of learned bits."""
    if torch.compiler.is_compiling():
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    else:
        held = _C.held_bytes(model)
    key = (len(quantizers), held)
    if model not in _others or _others[model][0] != key:
        from ..packed.size_report import bytes_beside_learned_bits  # the packed room stands on this one

        _others[model] = key, bytes_beside_learned_bits(model)
    return _others[model][1]
