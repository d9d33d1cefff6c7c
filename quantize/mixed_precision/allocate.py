"""The allocator: bits for each layer, the best within budgets, with a proof."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import _C
from ..checks import check_number
from ..patterns import exactly, resolve, unmatched
from ..table import aligned, kib, short_count
from .choices import Choice
from .costs import FLOAT_BITS
from .fields import check_finite, numbers_of
from .sensitivity import Sensitivity

# Weights and activations that stay as they are, in bits.
# What is called proven: the gap relative to the objective.
GAP = 1e-5


class Allocation(Mapping):
    """What :func:`allocate` returns: a configuration for :func:`quantize.prepare`, and how good it is.

    Immutable; printing it gives a table.

    As a mapping it leads from the modules' names (glob characters in them escaped) to weight configurations; None: left in full precision.

    Attributes:
        choice: {layer: (weight_bits, activation_bits)}.
        config: the mapping as a plain dict.
        objective: x' matrix x, the growth of the loss that the sensitivity predicts.
        lower_bound: no choice within the budgets has a lower objective (beyond rounding, 4e-12 of the largest entry).
        proven: the two are within 0.001 %.
        interrupted: Ctrl-C ended the search.
        bytes, bit_ops, latency: totals over the layers; latency is None where no table was given.
        average_bits: mean over the weights (32 for full precision), None where the sensitivity does not know their numbers.
        seconds: that the search took.
        sensitivity: what it was made from.

    Example:
        >>> matrix = torch.diag(torch.tensor([0.4, 0.1, 0.0, 0.9, 0.2, 0.0]))
        >>> sizes = torch.tensor([[20, 40, 80], [10, 20, 40]])
        >>> sensitivity = quantize.Sensitivity(["conv", "fc"], [(2, None), (4, None), (8, None)], matrix, sizes, 100 * sizes)
        >>> allocation = quantize.allocate(sensitivity, max_bytes=80)
        >>> {name: config.weight_bits for name, config in allocation.items()}
        {'conv': 4, 'fc': 8}
        >>> allocation.bytes, allocation.bit_ops, allocation.proven
        (80, 8000, True)
    """

    def __init__(self, sensitivity: Sensitivity, choices: list[int], found: dict, latency: Tensor | None, seconds: float):
        self.__dict__.update(_sensitivity=sensitivity, _choices=tuple(choices), _found=dict(found), _latency=latency, _seconds=seconds)

    def __setattr__(self, name, value):
        raise AttributeError(f"Allocation: {name} cannot be set; allocations are immutable")

    def __delattr__(self, name):
        raise AttributeError(f"Allocation: {name} cannot be deleted; allocations are immutable")

    def __getitem__(self, module: str):
        return self.config[module]

    def __iter__(self):
        return iter(self.config)

    def __len__(self):
        return len(self.config)

    @property
    def sensitivity(self) -> Sensitivity:
        """What it was made from."""
        return self._sensitivity

    @property
    def choice(self) -> dict[str, Choice]:
        """{layer: (weight_bits, activation_bits)}."""
        return {name: self._sensitivity.choices[k] for name, k in zip(self._sensitivity.layers, self._choices, strict=True)}

    @property
    def config(self) -> dict:
        """{module: weight configuration or None}, the modules' names as glob patterns."""
        s = self._sensitivity
        return {exactly(m): s.configs[k] for name, k in zip(s.layers, self._choices, strict=True) for m in s.members[name]}

    @property
    def objective(self) -> float:
        """x' matrix x."""
        return self._found["objective"]

    @property
    def lower_bound(self) -> float:
        """No choice within the budgets has a lower objective."""
        return self._found["lower_bound"]

    @property
    def proven(self) -> bool:
        """Whether the objective is within 0.001 % of its lower bound."""
        return self.objective - self.lower_bound <= GAP * abs(self.objective)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the search."""
        return self._found["interrupted"]

    @property
    def seconds(self) -> float:
        """That the search took."""
        return self._seconds

    @property
    def bytes(self) -> int | float:
        """Of all layers as stored."""
        return sum(self._column(self._sensitivity.bytes))

    @property
    def bit_ops(self) -> int | float:
        """Of all layers, a sample's forward pass."""
        return sum(self._column(self._sensitivity.bit_ops))

    @property
    def latency(self) -> float | None:
        """Of all layers, in the table's unit."""
        return None if self._latency is None else sum(self._column(self._latency))

    @property
    def average_bits(self) -> float | None:
        """Mean over the weights."""
        counts = self._sensitivity.parameters
        if counts is None or int(counts.sum()) == 0:
            return None
        bits = [FLOAT_BITS if weight is None else weight for weight, _ in self.choice.values()]
        return sum(b * n for b, n in zip(bits, counts.tolist(), strict=True)) / int(counts.sum())

    def _column(self, table: Tensor) -> list:
        return table[torch.arange(len(self._choices)), torch.tensor(self._choices)].tolist()

    def check_model(self, model: nn.Module) -> None:
        """As :meth:`Sensitivity.check_model`, of the sensitivity that it was made from.

        Args:
            model: a float or prepared model.

        Raises:
            TypeError: `model` is no nn.Module or a wrapper around it.
            ValueError: naming the first layer that it lacks, that is converted or not initialized, or whose weights have other shapes.
        """
        self._sensitivity.check_model(model)

    def __str__(self):
        columns = [list(self.choice), *([str(bits) if bits is not None else "float" for bits in side] for side in _sides(self.choice))]
        columns += [[kib(n) for n in self._column(self._sensitivity.bytes)]]
        columns += [[short_count(round(n)) for n in self._column(self._sensitivity.bit_ops)]]
        header = ["layer", "weight bits", "activation bits", "KiB", "bit operations"]
        totals = [f"{kib(self.bytes)} KiB", f"{short_count(round(self.bit_ops))} bit operations"]
        if self._latency is not None:
            columns, header = [*columns, [f"{t:.3g}" for t in self._column(self._latency)]], [*header, "latency"]
            totals.append(f"latency {self.latency:.4g}")
        if self.average_bits is not None:
            totals.append(f"{self.average_bits:.2f} bits a weight")
        table = aligned(header, zip(*columns, strict=True), "<" + ">" * (len(header) - 1))
        return f"{table}\n{', '.join(totals)}\n{self._quality()}"

    def _quality(self) -> str:
        says = "proven" if self.proven else "not proven" + (", interrupted" if self.interrupted else "")
        return f"objective {self.objective:.6g}, lower bound {self.lower_bound:.6g}: {says} in {self.seconds:.2f} s"

    def __repr__(self):
        return f"Allocation({len(self._choices)} layers, {self._quality()})"


def allocate(
    sensitivity: Sensitivity,
    max_bytes: float | None = None,
    max_bit_ops: float | None = None,
    time_limit: float = 10.0,
    *,
    latency: Tensor | None = None,
    max_latency: float | None = None,
    fixed: Mapping[str, Choice] | None = None,
) -> Allocation:
    """The choice of bits for each layer that the sensitivity predicts least growth of the loss for, within budgets.

    Minimises x' matrix x over x, one-hot in each layer, for any symmetric matrix, indefinite ones too. Equal objectives (within 1e-12 of
    the matrix' largest entry) go to more bits, with cross terms as far as the search tells them apart (a gap of 1e-5 is proof enough). The
    same question has the same answer, unless time ended the search.

    Args:
        sensitivity: from :func:`measure_sensitivity`, or made by hand.
        max_bytes: most bytes of the layers together as stored. ``sensitivity.other_bytes``, the rest of a file, is not among them.
        max_bit_ops: most bit operations of the layers together.
        time_limit: seconds. When they are over, the best choice so far and its bound are returned.
        latency: [L, K], of each layer at each choice, in any unit: :func:`quantize.measure_latency` gives seconds.
        max_latency: most of them together, in the same unit.
        fixed: choices that are made already, by glob patterns over the layers' names: ``{"conv1": (8, 8)}``. The last match wins.

    Returns:
        Allocation: ``quantize.prepare(model, allocation)`` takes it as it is. On Ctrl-C the best choice so far, with a RuntimeWarning.

    Raises:
        TypeError, ValueError: naming the argument; for a budget that cannot be met with the least that can.

    Source: convexification of one-hot binaries after Billionnet, Elloumi and Plateau (2009) by the mixing method (Wang, Chang and Kolter,
    arXiv 1706.00476), a Lagrangian bound, branch and bound; without cross terms dynamic programming. Single-threaded, in C++, without the
    GIL.

    Example:
        >>> matrix = torch.diag(torch.tensor([0.4, 0.1, 0.0, 0.9, 0.2, 0.0]))
        >>> sizes = torch.tensor([[20, 40, 80], [10, 20, 40]])
        >>> sensitivity = quantize.Sensitivity(["conv", "fc"], [(2, None), (4, None), (8, None)], matrix, sizes, 100 * sizes)
        >>> quantize.allocate(sensitivity, max_bytes=80).choice
        {'conv': (4, None), 'fc': (8, None)}
        >>> quantize.allocate(sensitivity, max_bytes=80, fixed={"conv": (8, None)}).choice
        Traceback (most recent call last):
        ValueError: allocate: max_bytes must be at least 90, the bytes of the smallest choices that fixed leaves; got 80
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(f"allocate: sensitivity must be a Sensitivity; got {type(sensitivity).__name__}")
    seconds = _number("time_limit", time_limit)
    if not seconds > 0:
        raise ValueError(f"allocate: time_limit must be above 0 seconds; got {time_limit}")
    if (latency is None) != (max_latency is None):
        given, missing = ("max_latency", "latency") if latency is None else ("latency", "max_latency")
        raise ValueError(f"allocate: latency and max_latency must be given together; got {given} without {missing}")
    table = None if latency is None else _latency_table(latency, sensitivity)
    allowed = _allowed(sensitivity, fixed)

    budgets = [("max_bytes", "bytes", sensitivity.bytes, max_bytes), ("max_bit_ops", "bit operations", sensitivity.bit_ops, max_bit_ops)]
    budgets = [budget for budget in [*budgets, ("max_latency", "latency", table, max_latency)] if budget[3] is not None]
    limits = [_number(name, limit) for name, _, _, limit in budgets]
    for (name, unit, costs, given), limit in zip(budgets, limits, strict=True):
        least = costs.double().masked_fill(~allowed, math.inf).amin(1).sum().item()
        rounding = abs(limit) * len(costs) * torch.finfo(torch.float64).eps if math.isfinite(limit) else 0.0  # of such a sum
        if least > limit + rounding:
            least = int(least) if least == int(least) else least
            left = " that fixed leaves" if fixed else ""
            raise ValueError(f"allocate: {name} must be at least {least}, the {unit} of the smallest choices{left}; got {given}")

    shape = (len(sensitivity.layers), len(sensitivity.choices))
    costs = torch.stack([costs.double() for _, _, costs, _ in budgets]) if budgets else torch.empty(0, *shape, dtype=torch.float64)
    start = time.perf_counter()
    matrix = sensitivity.matrix.contiguous()
    found = _C.allocate(matrix, costs.contiguous(), limits, _preference(sensitivity), allowed, seconds)
    names = " and ".join(name for name, *_ in budgets)
    if found["outcome"] == "infeasible":
        raise ValueError(f"allocate: {names} cannot be met together; each alone could be")
    if found["outcome"] == "not_found":
        if found["interrupted"]:
            raise KeyboardInterrupt
        raise ValueError(f"allocate: found no choice that meets {names} together in time_limit={time_limit} s; each alone could be met")
    allocation = Allocation(sensitivity, found["choice"], found, table, time.perf_counter() - start)
    if allocation.interrupted:
        warnings.warn(f"allocate: interrupted; the best so far: {allocation._quality()}", RuntimeWarning, stacklevel=2)
    return allocation


def _number(name: str, value) -> float:
    check_number("allocate", name, value)
    try:
        value = float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf
    if math.isnan(value):
        raise ValueError(f"allocate: {name} must not be NaN")
    return value


def _latency_table(latency, sensitivity: Sensitivity) -> Tensor:
    table = numbers_of("latency", latency, "allocate")
    shape = [len(sensitivity.layers), len(sensitivity.choices)]
    if list(table.shape) != shape:
        raise ValueError(f"allocate: latency must be {shape}, as the sensitivity's layers and choices; got {list(table.shape)}")
    check_finite("latency", table, sensitivity.layers, sensitivity.choices, 0, "allocate")
    return table.double().clone()


def _allowed(sensitivity: Sensitivity, fixed) -> Tensor:
    """bool [L, K]: the choices that `fixed` leaves."""
    if fixed is not None and not isinstance(fixed, Mapping):
        raise TypeError(f"allocate: fixed must be a mapping from glob patterns over layers to choices; got {fixed!r}")
    fixed = fixed or {}
    for pattern, choice in fixed.items():
        if not isinstance(pattern, str):
            raise TypeError(f"allocate: fixed's keys must be glob patterns over the layers' names; got {pattern!r}")
        if not isinstance(choice, (tuple, list)) or tuple(choice) not in sensitivity.choices:
            raise ValueError(f"allocate: fixed must have choices of the sensitivity, {sensitivity.choices}; got {choice!r} for {pattern!r}")
    for pattern in unmatched(fixed, list(sensitivity.layers)):
        raise ValueError(f"allocate: fixed must name layers of the sensitivity; got {pattern!r}, which fits none")
    allowed = torch.ones(len(sensitivity.layers), len(sensitivity.choices), dtype=torch.bool)
    for row, name in zip(allowed, sensitivity.layers, strict=True):
        choice = resolve(fixed, name)
        if choice is not None:
            row[:] = False
            row[sensitivity.choices.index(tuple(choice))] = True
    return allowed


def _preference(sensitivity: Sensitivity) -> Tensor:
    """float64 [L, K]: bits of weights and activations, by the number of weights where it is known."""
    bits = torch.tensor([sum(FLOAT_BITS if b is None else b for b in choice) for choice in sensitivity.choices], dtype=torch.float64)
    counts = sensitivity.parameters
    weights = torch.ones(len(sensitivity.layers)) if counts is None else counts
    return weights.double().unsqueeze(1) * bits


def _sides(choice: Mapping[str, Choice]) -> list[list[int | None]]:
    return [list(side) for side in zip(*choice.values(), strict=True)]
