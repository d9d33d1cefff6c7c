"""What is computed together with what comes after it: a layer's output where a sum, a clip or the next layer is to come (chains.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inputs import Unfinished, raise_named

ADD, CLIP, CODES, NORM, POOL = "add", "clip", "codes", "norm", "pool"


class Pending(Unfinished):
    """An output that is not computed yet: what comes after it goes into the same pass. Whatever else is done with it computes it first.

    `call(x, **named)` computes it, with what packed_conv2d has for that: residual, low, high, next_step, next_zero_point, next_bits; a
    first convolution that stays float (stems.py) with norm, low, high, window, window_stride, window_padding. `steps`: which of ADD, CLIP
    and CODES, or of NORM, CLIP and POOL, are to come, in this order. `layer`: whose output it is.
    """

    __slots__ = ("_call", "_layer", "_named", "_steps", "_value", "_x")

    def __init__(self, call: Callable[..., Tensor], x: Tensor, steps: tuple[str, ...], layer: nn.Module, named: dict | None = None):
        self._call, self._x, self._steps, self._layer, self._named, self._value = call, x, steps, layer, named or {}, None

    def _compute(self, **named) -> Tensor:
        try:
            return self._call(self._x, **named)
        except Exception as error:
            raise_named(error, self._layer, self._x, handed_on=True)

    def value(self) -> Tensor:
        """The output itself."""
        if self._value is None:
            self._value, self._x = self._compute(**self._named), None
        return self._value

    def around(self, wrap: Callable[[Callable], Callable]) -> Pending:
        """The same output, computed by wrap(call)."""
        return Pending(wrap(self._call), self._x, self._steps, self._layer, self._named)

    def codes(self, step: Tensor, zero_point: Tensor, bits: int) -> Tensor | None:
        """What the next convolution makes of it, where that is all that is to come."""
        if self._value is not None or self._steps != (CODES,):
            return None
        return self._compute(**self._named, next_step=step, next_zero_point=zero_point, next_bits=bits)

    def _with(self, named: dict) -> Pending | Tensor:
        steps = self._steps[1:]
        if self._named:
            named = {**self._named, **named}
        return Pending(self._call, self._x, steps, self._layer, named) if steps else self._compute(**named)

    def _awaits(self, step: str) -> bool:
        return self._value is None and self._steps[:1] == (step,)

    def clip(self, low: float, high: float | None = None) -> Pending | Tensor:
        """Between these ends."""
        if self._awaits(CLIP):
            return self._with({"low": low} if high is None else {"low": low, "high": high})
        return self.value().clamp(low, high)

    def norm(self, norm: nn.BatchNorm2d) -> Pending | Tensor | None:
        """After a batch norm by its running statistics, where that is what is to come."""
        return self._with({"norm": norm}) if self._awaits(NORM) else None

    def pool(self, window: list[int], stride: list[int], padding: list[int]) -> Tensor | None:
        """The maxima of windows, where they are what is to come."""
        return self._with({"window": window, "window_stride": stride, "window_padding": padding}) if self._awaits(POOL) else None

    def relu(self) -> Pending | Tensor:
        """Without what is below zero."""
        return self.clip(0.0)

    relu_ = relu

    def __add__(self, other):
        if not self._awaits(ADD) or type(other) is not Tensor or other.device != self._x.device:
            return self.value() + _computed(other)
        if other.requires_grad and torch.is_grad_enabled():
            return self.value() + other
        return self._with({"residual": other})

    __radd__ = __iadd__ = __add__

    def __getattr__(self, name: str):
        if name in Pending.__slots__:  # of a copy in the making
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        ends = _CLIPS.get(func)
        if ends is not None and type(args[0]) is Pending and args[0]._awaits(CLIP):
            return args[0].clip(*ends(*args[1:], **(kwargs or {})))
        if func in _SUMS and len(args) == 2 and not kwargs and type(args[0]) is not Pending:
            return args[1] + args[0]  # `shortcut + output`
        return func(*_computed(args), **_computed(kwargs or {}))


_SUMS = (Tensor.__add__, Tensor.add, torch.add)
_CLIPS = {  # the ends, by the arguments behind the first
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), lambda inplace=False: (0.0,)),
    F.relu6: lambda inplace=False: (0.0, 6.0),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: (min_val, max_val),
}


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
