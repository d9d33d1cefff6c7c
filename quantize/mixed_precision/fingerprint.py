"""What a measurement depends on, in a word."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def fingerprint(model: nn.Module, batches, others) -> str:
    """A hexadecimal digest of the model's state, the batches and the `others`' repr."""
    digest = hashlib.sha256(repr(others).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _update(digest, tensor)
    for leaf in tree_leaves([tuple(batch) for batch in batches]):
        _update(digest, leaf)
    return digest.hexdigest()


def spelled(value) -> str:
    """A function by its name, which is the same in all processes; its repr tells an address."""
    if isinstance(value, functools.partial):
        return spelled((value.func, *value.args, *value.keywords.items()))
    if isinstance(value, tuple):
        return f"({', '.join(map(spelled, value))})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__ if callable(value) else repr(value)


def _update(digest, value) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype}{list(value.shape)}".encode())
    if value.numel() and not value.is_meta:
        digest.update(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
