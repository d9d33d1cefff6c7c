"""Steps of adaptive bits as a long training has them."""

from collections.abc import Callable

import torch

from quantize.activation.allocation import ALL_TEACH, PERIOD

STEPS = PERIOD  # of a turn in which adaptive bits train


def settle(model: torch.nn.Module, step: Callable[[], object]) -> None:
    """Brings the adaptive bits of `model`, of which `step` is a training step, to where they have learned something and one step in STEPS
    teaches. Whoever times them takes turns of so many."""
    for _ in range(20):
        step()
    for state in model._control.states():
        state.steps = ALL_TEACH
