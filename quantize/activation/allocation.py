"""Moving bits between layers: what the last step taught, turned into budgets for the next."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..checks import is_integer, is_number
from .state import LEARNED, LayerState

WHO = "load_activation_state"
# Averages of bits at which a layer's variance is followed. Where a few samples carry the gradient, most is won just above one bit.
AVERAGES = (1, 1.125, 1.25, 1.5, 2, 3, 4, 6, 8)
MEMORY = 0.9  # of the running mean of sensitivities; exact mean until that many steps have been seen
# So many steps at first, in which sensitivities move fast, and each fourth then: learning them costs up to a tenth of a step.
ALL_TEACH, PERIOD = 100, 4


def teaches(steps: int) -> bool:
    """Whether bits between layers are learned from a step with so many before it."""
    return steps < ALL_TEACH or steps % PERIOD == 0


def learn(states: Iterable[LayerState], curves: bool = True) -> list[tuple[LayerState, Tensor]]:
    """The records of the step that ended, in order of the forward, as (layer, its gradient variance at AVERAGES).

    A layer's noise counts for its own parameters; a batch norm's also for those of all layers before it, through the input gradient
    (csrc/layers/energy.h). Records whose backward has not run are dropped. Tensors stay on their device: nothing is synchronised.
    Without `curves` only the samples' gradients are kept, and the list is empty.
    """
    learned = []
    upstream = None
    for state in states:
        total = None
        for record in state.records:
            weight = torch.zeros_like(record.variance[:, 0])
            for energy, is_norm in zip(record.energies, record.is_norm, strict=True):
                own, second = energy.unbind(1)
                if is_norm:
                    weight = weight + own + (second * upstream if upstream is not None else 0)
                else:
                    weight = weight + own
                    share = second.sum().nan_to_num()
                    upstream = share if upstream is None else upstream + share
            if record.indices is not None:
                state.pending_gradients = (record.indices, weight)
            if not curves:
                continue
            curve = _curve(record.variance.nan_to_num(), weight, record.indices is not None, state.config.max_bits)
            total = curve if total is None else total + curve
        state.records = []
        if total is not None:
            learned.append((state, total))
    return learned


def _curve(variance: Tensor, weight: Tensor, use_gradient: bool, max_bits: int) -> Tensor:
    """The layer's gradient variance at AVERAGES, each shared out between the samples as packing will do it; 0 beyond `max_bits`."""
    cost = variance * weight[:, None]
    return torch.ops.quantize.allocation_curve(cost.nan_to_num() if use_gradient else variance, cost, AVERAGES, max_bits)


def update_curve(state: LayerState, curve: list[float]) -> None:
    """One more step in the running mean; figures of a backward that did not run or overflowed (not finite) are left out."""
    if not all(math.isfinite(v) for v in curve):
        return
    state.updates += 1
    keep = min(MEMORY, 1 - 1 / state.updates)
    old = state.curve or [0.0] * len(curve)
    state.curve = [keep * o + (1 - keep) * c for o, c in zip(old, curve, strict=True)]


LARGEST_COUNT = 2**63 - 1


def checked_state(state) -> dict[str, dict]:
    """What :meth:`QModule.activation_state` gives, or a part of it, as a copy on the CPU. TypeError or ValueError for anything else."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{WHO}: state must map layer names to dictionaries; got {type(state).__name__}")
    for name, values in state.items():
        if not isinstance(name, str):
            raise TypeError(f"{WHO}: state must map layer names to dictionaries; got {name!r} as a name")
        if not isinstance(values, Mapping):
            raise TypeError(f"{WHO}: state must map layer names to dictionaries; got {type(values).__name__} for {name!r}")
    return {name: {key: _checked(name, key, value) for key, value in values.items()} for name, values in state.items()}


def _checked(layer: str, key, value):
    """An entry of :meth:`LayerState.learned` for a layer."""
    if key not in LEARNED:
        raise ValueError(f"{WHO}: layer {layer!r} must have no entries but {', '.join(LEARNED)}; got {key!r}")
    if key == "budget":
        fits, form = is_number(value) and 1 <= value <= 8, "a number from 1 to 8"
    elif key == "curve":
        most = sys.float_info.max
        fits = value is None or (isinstance(value, (list, tuple)) and len(value) == len(AVERAGES))
        fits = fits and all(is_number(v) and 0 <= v <= most for v in value or ())
        form = f"None or a list of {len(AVERAGES)} finite numbers from 0"
    elif key == "sample_weight":
        fits, form = value is None or _is_weight(value), "None or a dense float32 Tensor[N] of numbers from 0 or NaN"
    else:
        fits, form = is_integer(value) and 0 <= value <= LARGEST_COUNT, "an integer from 0 to 2^63 - 1"
    if not fits:
        raise ValueError(f"{WHO}: {key} of layer {layer!r} must be {form}; got {_text(value)}")
    if value is None:
        return None
    if key == "curve":
        return [float(v) for v in value]
    if key == "sample_weight":  # perhaps of a checkpoint that was read to a GPU, and not to be written into
        return value.detach().to("cpu", copy=True)
    return float(value) if key == "budget" else int(value)


def _is_weight(value) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.is_meta or value.layout != torch.strided:
        return False
    return value.dtype == torch.float32 and value.dim() == 1 and not bool((value < 0).any())


def _text(value) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = "a nested Tensor" if value.is_nested else f"a {value.dtype} Tensor{list(value.shape)}"
    return f"{kind} of {value.layout} on {value.device}"


def share_bits(states: list[LayerState]) -> None:
    """Sets the budgets of layers under one config: the sum of their variances as small as the average number of bits allows.

    The greedy solution on each layer's lower convex hull, the last upgrade taken in part: the optimum of the problem in which a layer may
    mix bit widths over its samples, which it may.
    """
    states = [s for s in states if s.curve is not None and s.elements > 0]
    if not states:
        return
    config = states[0].config
    upgrades = []
    for number, state in enumerate(states):
        for key, start, stop in _hull(state.curve, config.max_bits):
            upgrades.append((-key / state.elements, start, number, stop - start))
    upgrades.sort()
    budgets = [1.0] * len(states)
    left = (config.bits - 1) * sum(s.elements for s in states)
    for _, _, number, bits in upgrades:
        cost = bits * states[number].elements
        part = min(1.0, left / cost) if cost else 0.0
        budgets[number] += part * bits
        left -= part * cost
        if left <= 0:
            break
    for state, budget in zip(states, budgets, strict=True):
        state.budget = budget


def _hull(curve: list[float], max_bits: int) -> list[tuple[float, float, float]]:
    """The lower convex hull of variance over bits: (variance removed per bit, from, to), steepest first."""
    points = [(b, v) for b, v in zip(AVERAGES, curve, strict=True) if b <= max_bits]
    hull: list[tuple[float, float, float]] = []
    for (start, before), (stop, after) in zip(points, points[1:], strict=False):
        gain = max(before - after, 0.0)
        while hull and hull[-1][0] * (stop - start) < gain:
            key, start, last = hull.pop()
            gain += key * (last - start)
        hull.append((gain / (stop - start), start, stop))
    return hull
