"""Running a model again from a layer on: what came before the layer is not computed anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Call:
    """A module's call in a recorded forward pass, with the calls inside it. Times count starts and ends of calls."""

    __slots__ = ("children", "end", "module", "output", "start", "written")

    def __init__(self, module: nn.Module | None, start: int = 0):
        self.module, self.start, self.end = module, start, 0
        self.children: list[Call] = []
        self.output: Any = None
        self.written = False  # into its output, by what came after it


class Replay:
    """Forward passes of `model` that begin at a layer.

    :meth:`record` runs the model and keeps what every module returned. :meth:`run` runs it again: modules whose calls had ended when the
    layer's began return what they returned, only what follows is computed. So nothing before the layer may have changed since. It
    works by replacing `forward` of each module, and with any control flow: where the calls are not the recorded ones, all is computed.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.recording = False
        self.stack: list[tuple[Call, int]] | None = None  # open calls and how many of their children are over; None: do not look
        self.clock = self.cut = 0
        self.returned: list[tuple[Call, Tensor, int]] = []
        for module in model.modules():
            module.forward = self._wrapped(module, module.forward)

    def _wrapped(self, module: nn.Module, forward: Callable) -> Callable:
        def call(*args, **kwargs):
            if self.stack is None:
                return forward(*args, **kwargs)
            return (self._record if self.recording else self._replay)(module, forward, args, kwargs)

        return call

    def record(self, *args, **kwargs) -> tuple[Any, Call]:
        """The model's output, and the record for :meth:`run`."""
        root = Call(None)
        self.stack, self.recording, self.clock = [(root, 0)], True, 0
        try:
            output = self.model(*args, **kwargs)
            for call, tensor, version in self.returned:
                call.written |= tensor._version != version
        finally:
            self.stack, self.recording, self.returned = None, False, []
        return output, root

    def _record(self, module, forward, args, kwargs):
        call = Call(module, self.clock)
        self.clock += 1
        self.stack[-1][0].children.append(call)
        self.stack.append((call, 0))
        output = forward(*args, **kwargs)
        self.stack.pop()

        def keep(tensor: Tensor) -> Tensor:
            self.returned.append((call, tensor, tensor._version))
            return tensor.clone()

        call.output, call.end = tree_map_only(Tensor, keep, output), self.clock
        self.clock += 1
        return output

    def run(self, record: Call, start: int, *args, **kwargs) -> Any:
        """The model's output where nothing that ended before the time `start` needs computing. Arguments as recorded."""
        self.stack, self.cut = [(record, 0)], start
        try:
            return self.model(*args, **kwargs)
        finally:
            self.stack = None

    def _replay(self, module, forward, args, kwargs):
        parent, done = self.stack[-1]
        call = parent.children[done] if done < len(parent.children) else None
        if call is None or call.module is not module:
            self.stack = None  # another path: from here on all is computed
            return forward(*args, **kwargs)
        self.stack[-1] = parent, done + 1
        if call.end < self.cut:
            return tree_map_only(Tensor, Tensor.clone, call.output) if call.written else call.output
        self.stack.append((call, 0))
        output = forward(*args, **kwargs)
        if self.stack is not None:
            self.stack.pop()
        return output


def first_calls(record: Call) -> dict[nn.Module, int]:
    """When each module was called first."""
    found, left = {}, [record]
    while left:
        call = left.pop()
        if call.module is not None:
            found[call.module] = min(call.start, found.get(call.module, call.start))
        left += call.children
    return found


def call(function: Callable, inputs, *first):
    """`function` of a batch's inputs, after the arguments `first`. Of copies: models may write into what they are given."""
    inputs = tree_map_only(Tensor, Tensor.clone, inputs)
    return function(*first, **inputs) if isinstance(inputs, Mapping) else function(*first, *positional(inputs))


def samples_in(inputs) -> int:
    """Of a batch: the length of its first tensor."""
    return len(next(x for x in (inputs.values() if isinstance(inputs, Mapping) else positional(inputs)) if isinstance(x, Tensor)))


def positional(inputs) -> tuple:
    """A batch's inputs as the model's arguments."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
