"""What the layers of a QModule share: the steps that they learn from, and the bits that move between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from .allocation import learn, share_bits, teaches, update_curve
from .config import ActivationConfig
from .state import LayerState


class Control:
    """What a QModule knows beside its layers: config, states of functional calls, the step's samples, the figures on their way."""

    def __init__(self, config):
        self.config = config
        self.functional: dict[str, LayerState] = {}
        self.layers: list[LayerState] = []
        self.indices: Tensor | None = None
        self.arriving: list[tuple] = []  # figures being copied from the device, oldest first: (what takes them, pinned tensor, event)

    def __getstate__(self):
        return {**self.__dict__, "indices": None, "arriving": []}

    def states(self) -> list[LayerState]:
        """All lossy layers' states, then those of functional calls."""
        return [*self.layers, *self.functional.values()]

    def configs(self) -> list[ActivationConfig]:
        """All that a layer may have."""
        return [c for c in (self.config.values() if isinstance(self.config, Mapping) else [self.config]) if c is not None]

    def count_step(self) -> bool:
        """Counts the step that begins; whether it teaches how to move bits between layers."""
        if not any(c.enabled and c.adaptive and c.per_layer for c in self.configs()):
            return False
        states = self.states()
        steps = max((s.steps for s in states), default=0)
        for state in states:
            state.steps = steps + 1
        return teaches(steps)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Learns from the step that ended and sets the budgets of the one that begins. Never waits for the device."""
        self.receive()
        states = sorted((s for s in self.states() if s.records), key=lambda s: s.order or 0)
        learned = learn(states, curves=not self.arriving)  # of one step at a time
        seen = []
        for state in states:
            pending, state.pending_gradients = state.pending_gradients, None
            if pending is not None:
                seen.append((state, *pending))
        if seen:
            self._bring(torch.cat([weight for *_, weight in seen]), partial(_remember, [entry[:2] for entry in seen]))
        if learned:
            self._bring(torch.stack([curve for _, curve in learned]), partial(self._update, [state for state, _ in learned]))

    def _bring(self, figures: Tensor, take: Callable[[Tensor], None]) -> None:
        """take(figures) with figures on the CPU: from a GPU by the first step that finds them there."""
        if figures.is_meta or type(figures).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # no values, as fake tensors have none
            return
        if not figures.is_cuda:
            take(figures)
            return
        host = torch.empty(figures.shape, dtype=figures.dtype, device="cpu", pin_memory=True).copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(figures.device))
        self.arriving.append((take, host, event))

    def receive(self, wait: bool = False) -> None:
        """Takes the figures that have come, or all."""
        while self.arriving and (wait or self.arriving[0][2].query()):
            take, host, event = self.arriving.pop(0)
            if wait:
                event.synchronize()
            take(host)

    def _update(self, owners: list[LayerState], figures: Tensor) -> None:
        for state, curve in zip(owners, figures.tolist(), strict=True):
            update_curve(state, curve)
        by_config: dict[ActivationConfig, list[LayerState]] = {}
        for state in self.states():
            if state.config.adaptive and state.config.per_layer:
                by_config.setdefault(state.config, []).append(state)
        for states in by_config.values():
            share_bits(states)


def _remember(samples: list[tuple[LayerState, Tensor]], weights: Tensor) -> None:
    """Of layers, each with the indices of its samples: all their gradients' magnitudes in one tensor."""
    for (state, indices), weight in zip(samples, weights.split([len(indices) for _, indices in samples]), strict=True):
        state.remember_gradients(indices, weight)
