"""Calls of models whose inputs somebody else has put together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn


def call(model: nn.Module, *inputs):
    """model(*inputs); of one mapping alone, as tokenizers and data loaders give them, model(**mapping) if its keys name what the forward
    takes."""
    args, kwargs = arguments(model, inputs)
    return model(*args, **kwargs)


def arguments(model: nn.Module, inputs: tuple) -> tuple[tuple, Mapping]:
    """What :func:`call` calls with."""
    by_name = len(inputs) == 1 and _names_arguments(inputs[0], model)
    return ((), inputs[0]) if by_name else (inputs, {})


def _names_arguments(value, model: nn.Module) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    try:
        inspect.signature(model.forward).bind(**value)
    except (TypeError, ValueError):  # other names; a forward without a signature
        return False
    return True
