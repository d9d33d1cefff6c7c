"""How much variance compression adds to the gradient, beside the variance that sampling has anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calls import call
from ..checks import check_integer, check_module
from ..losses import checked_loss
from .control import Control
from .memory_report import unchanged
from .module import controls_of
from .state import override

SETTLING_STEPS = 12  # of bits that move between layers


class VarianceReport(NamedTuple):
    """What :func:`variance_report` returns: squared Euclidean norms over all parameters' gradients.

    Attributes:
        overall: quantization + sample.
        quantization: mean over batches and draws of ||g_hat - g_b||^2.
        sample: mean over batches of ||g_b - g||^2, g the mean of all g_b.
    """

    overall: float
    quantization: float
    sample: float

    def __str__(self):
        return f"Overall Var = {self.overall:.6g}   Quant Var = {self.quantization:.6g}   Sample Var = {self.sample:.6g}"


def variance_report(model: nn.Module, batches: Iterable, loss_fn, draws: int = 10) -> VarianceReport:
    """Measures the variance of the weights' gradient at fixed weights.

    All draws of a batch have the same dropout; only the noise of the compression differs. Bits that adapt between layers or by
    gradients settle first, over at least 12 steps. Weights, buffers, generators and learned bits are as before afterwards.

    Args:
        model: a :class:`quantize.QModule`, a model that has one inside, or one with compressed layers.
        batches: (input, target) pairs, kept in memory. An input that is a mapping holds the model's arguments by name.
        loss_fn: ``loss_fn(output, target) -> scalar Tensor``.
        draws: of the noise, a batch; 10 or more for a usable figure.

    Returns:
        VarianceReport: the variance that compression adds, that of sampling, and their sum.

    Raises:
        TypeError: a batch is not a pair, or an argument of another type.
        ValueError: no batches, draws < 1, no parameter that requires a gradient, a loss that is none or not finite, or in
            torch.inference_mode().

    Example:
        >>> model = quantize.QModule(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)))
        >>> batches = [(torch.randn(8, 64), torch.randint(2, (8,))) for _ in range(3)]
        >>> report = quantize.variance_report(model, batches, nn.functional.cross_entropy)
        >>> report.overall == report.quantization + report.sample
        True

    Source: ActNN, arXiv 2104.14129, eq. 4 (law of total variance).
    """
    check_module("variance_report", model)
    if not isinstance(batches, Iterable):
        raise TypeError(f"variance_report: batches must be an iterable of (input, target) pairs; got {type(batches).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"variance_report: loss_fn must be callable; got {loss_fn!r}")
    check_integer("variance_report", "draws", draws, 1)
    batches = list(batches)
    if not batches:
        raise ValueError("variance_report: batches must hold at least one (input, target) pair; got none")
    wrong = [type(b).__name__ for b in batches if not isinstance(b, (tuple, list)) or len(b) != 2]
    if wrong:
        raise TypeError(f"variance_report: batches must hold (input, target) pairs; got {wrong[0]}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("variance_report: model must have parameters that require gradients; it has none")
    if torch.is_inference_mode_enabled():
        raise ValueError("variance_report: model must not be run in torch.inference_mode(), where there are no gradients")
    noise = torch.Generator().manual_seed(torch.initial_seed() & (2**63 - 1))
    controls = controls_of(model).values()
    indexed = [control for control in controls if any(c.use_gradient for c in control.configs())]
    if indexed:
        _check_lengths([target for _, target in batches])

    def gradient(number: int, disabled: bool) -> Tensor:
        inputs, target = batches[number]
        torch.manual_seed(number)  # the same dropout in every draw
        for control in [] if disabled else indexed:
            first = sum(len(b[1]) for b in batches[:number])
            control.indices = torch.arange(first, first + len(target), device="cpu")
        with override(disabled, noise), torch.enable_grad():
            loss = checked_loss("variance_report", loss_fn(call(model, inputs), target), f" of batch {number}")
            if not loss.requires_grad:
                raise ValueError(f"variance_report: loss_fn must return a loss with a gradient; got one without, of batch {number}")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError(
                "variance_report: model must have parameters that the loss depends on; it depends on none of them, as where a forward "
                "takes others in their place (FSDP's do: report before the model is sharded)"
            )
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in zip(gradients, parameters, strict=True)])

    with unchanged(model):
        for state in [state for control in controls for state in control.states()]:
            state.steps = 0  # each step teaches, as in a model's first ones
        for step in range(_settling_steps(controls, len(batches))):
            gradient(step % len(batches), disabled=False)
        mean, energy, quantization = 0, 0.0, 0.0
        for number in range(len(batches)):
            exact = gradient(number, disabled=True)
            mean = mean + exact / len(batches)
            energy += float(exact.square().sum()) / len(batches)
            for _ in range(draws):
                drawn = gradient(number, disabled=False)
                quantization += float((drawn - exact).square().sum()) / (draws * len(batches))
    sample = max(energy - float(mean.square().sum()), 0.0)
    return VarianceReport(quantization + sample, quantization, sample)


def _check_lengths(targets: list) -> None:
    """That targets tell how many samples there are, whose gradients are kept one by one."""
    for number, target in enumerate(targets):
        if not isinstance(target, Sized) or (isinstance(target, Tensor) and not target.dim()):
            found = "a Tensor without dimensions" if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(
                f"variance_report: batches must have targets with a length where bits adapt by gradients; got {found} in number {number}"
            )


def _settling_steps(controls: Iterable[Control], batches: int) -> int:
    adaptive = [c for control in controls for c in control.configs() if c.enabled and c.adaptive]
    steps = SETTLING_STEPS if any(c.per_layer for c in adaptive) else 0
    return max(steps, batches) if any(c.use_gradient for c in adaptive) else steps
