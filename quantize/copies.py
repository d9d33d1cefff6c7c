"""Copies of whole models."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def copy_of(model: nn.Module, who: str, shared: dict | None = None) -> nn.Module:
    """A deep copy. Activations that a forward pass left in the modules' attributes are in it without their graphs, uncopied.

    Args:
        model: any module.
        who: the public function that wants it, for errors.
        shared: {id: object} of what the copy has in place of copies.

    Raises:
        TypeError: an attribute cannot be copied; it is named.
    """
    memo = dict(shared or {})
    for module in model.modules():
        for value in tree_leaves({name: value for name, value in vars(module).items() if name not in ("_parameters", "_modules")}):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                if attribute != "_modules" and not _copies(value, memo):
                    where = f"{name}.{attribute}" if name else attribute
                    what = f"its attribute {where!r}, a {type(value).__name__}"
                    raise TypeError(f"{who}: model must be one that copy.deepcopy copies; {what}, is not: {error}") from error
        raise


def _copies(value, memo: dict) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True
