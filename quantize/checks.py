"""Checks of arguments that every room has: errors name the function, the argument, what it must be and what came."""

from __future__ import annotations

from numbers import Integral, Real

from torch import Tensor, nn


def is_integer(value) -> bool:
    """Whether `value` is a whole number by its type, NumPy's included. A bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether `value` is a real number by its type, NumPy's included. A bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_integer(who: str, name: str, value, least: int | None = None, most: int | None = None, expected: str = "") -> None:
    """TypeError if `value` is no integer, ValueError if it is out of range. `expected`: in words, where the range does not say it."""
    _check(who, name, value, is_integer(value), least, most, expected or _words("an integer", least, most))


def check_number(who: str, name: str, value, least: float | None = None, most: float | None = None, expected: str = "") -> None:
    """As check_integer, of real numbers; NaN is in no range."""
    _check(who, name, value, is_number(value), least, most, expected or _words("a number", least, most))


def check_module(who: str, model) -> None:
    """TypeError if `model` is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module; got {type(model).__name__}")


def first_of(who: str, batch, number: int, may_be_empty: bool = False):
    """The inputs of a batch, which may be the first of a tuple or list. ValueError if there are none, or no samples in them."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(f"{who}: batches must hold inputs; got an empty {type(batch).__name__}, number {number}")
        batch = batch[0]
    if isinstance(batch, Tensor) and not batch.numel() and not may_be_empty:
        raise ValueError(f"{who}: batches must hold samples; got inputs of shape {list(batch.shape)}, number {number}")
    return batch


def _check(who: str, name: str, value, fits: bool, least, most, expected: str) -> None:
    if not fits:
        raise TypeError(f"{who}: {name} must be {expected}; got {value!r}")
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        raise ValueError(f"{who}: {name} must be {expected}; got {value!r}")


def _words(kind: str, least, most) -> str:
    return kind if least is None else f"{kind} of at least {least}" if most is None else f"{kind} from {least} to {most}"
