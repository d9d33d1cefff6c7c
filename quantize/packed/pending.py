"""Sums that are computed with one of their terms: what a layer hands on where nothing but a sum is to come (sums.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Pending:
    """An output that is not computed yet: what it is added to goes into the same pass. Whatever else is done with it computes it first.

    `call(x, residual=None)` computes it.
    """

    __slots__ = ("_call", "_value", "_x")

    def __init__(self, call: Callable[..., Tensor], x: Tensor):
        self._call, self._x, self._value = call, x, None

    def value(self) -> Tensor:
        """The output itself."""
        if self._value is None:
            self._value, self._x = self._call(self._x), None
        return self._value

    def around(self, wrap: Callable[[Callable], Callable]) -> Pending:
        """The same output, computed by wrap(call)."""
        return Pending(wrap(self._call), self._x)

    def __add__(self, other):
        if self._value is not None or type(other) is not Tensor or other.device != self._x.device:
            return self.value() + _computed(other)
        if other.requires_grad and torch.is_grad_enabled():
            return self.value() + other
        return self._call(self._x, other)

    __radd__ = __iadd__ = __add__

    def __getattr__(self, name: str):
        if name in Pending.__slots__:  # of a copy in the making
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _SUMS and len(args) == 2 and not kwargs and not isinstance(args[0], Pending):
            return args[1] + args[0]  # `shortcut + output`
        return func(*_computed(args), **_computed(kwargs or {}))


_SUMS = (Tensor.__add__, Tensor.add, torch.add)


def _through(name: str):
    return lambda self, *args: getattr(self.value(), name)(*map(_computed, args))


# Operators are looked up in the class.
for _name in (
    *(f"__{side}{name}__" for side in ("", "r", "i") for name in ("sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
    *(f"__{name}__" for name in ("matmul", "rmatmul", "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert")),
    *(f"__{name}__" for name in ("getitem", "setitem", "len", "iter", "contains", "bool", "int", "float", "index", "array", "format")),
):
    setattr(Pending, _name, _through(_name))


def _computed(value):
    if isinstance(value, Pending):
        return value.value()
    if type(value) in (tuple, list):
        return type(value)(map(_computed, value))
    return {name: _computed(item) for name, item in value.items()} if type(value) is dict else value
