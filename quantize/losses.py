"""What a caller's loss function gives back."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_loss(who: str, loss, of: str = "") -> Tensor:
    """`loss`, which loss_fn returned. TypeError if it is no real scalar Tensor, ValueError if it is not finite; `of`: of what it is."""
    expected = f"{who}: loss_fn must return a scalar Tensor"
    if not isinstance(loss, Tensor):
        raise TypeError(f"{expected}; got {type(loss).__name__}")
    if loss.is_nested or loss.numel() != 1:
        raise ValueError(f"{expected}; got {'a nested one' if loss.is_nested else list(loss.shape)}")
    if loss.is_complex() or loss.dtype == torch.bool:
        raise TypeError(f"{expected} of a real number; got {loss.dtype}")
    if not loss.is_meta and not bool(loss.isfinite()):
        raise ValueError(f"{who}: loss_fn must return a finite loss; got {loss.item()}{of}")
    return loss.reshape(())
