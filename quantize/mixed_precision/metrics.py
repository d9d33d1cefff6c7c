"""How far a quantized model is from the float one: the metrics of sensitivities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def as_logits(output, who: str) -> Tensor:
    """The model's output as float64 [samples, classes]; classes are dimension 1. TypeError or ValueError for what is none."""
    output = getattr(output, "logits", output)  # of Hugging Face's models
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = getattr(output, "dtype", type(output).__name__)
        raise TypeError(f"{who}: model must return logits, a floating-point Tensor[N, classes, ...]; got {found}")
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(f"{who}: model must return logits [N, classes, ...] of at least 2 classes; got {list(output.shape)}")
    if not bool(output.isfinite().all()):
        raise ValueError(f"{who}: model's outputs must be finite; got {int((~output.isfinite()).sum())} values that are NaN or infinite")
    return output.movedim(1, -1).reshape(-1, output.shape[1]).double()


class KL:
    """KL(float || quantized) in nats, mean over samples (and positions, where the output has them)."""

    def __init__(self, output, targets, who: str):
        self.who = who
        self.log = F.log_softmax(as_logits(output, who), 1)
        self.samples = len(self.log)

    def __call__(self, output) -> Tensor:
        """The sum over samples."""
        return (self.log.exp() * (self.log - F.log_softmax(as_logits(output, self.who), 1))).sum()


class Loss:
    """The growth of a loss that is a mean over samples."""

    def __init__(self, output, targets, who: str, loss_fn: Callable):
        self.loss_fn, self.targets = loss_fn, targets
        self.samples = len(targets)
        self.reference = self._loss(output)
        if not bool(torch.isfinite(self.reference)):
            raise ValueError(f"{who}: the model's loss must be finite; got {float(self.reference)}")

    def _loss(self, output) -> Tensor:
        if isinstance(output, Tensor) and output.is_floating_point():
            output = output.double()
        return self.loss_fn(output, self.targets).double()

    def __call__(self, output) -> Tensor:
        """The sum over samples."""
        return self.samples * (self._loss(output) - self.reference)


def gauss_newton_features(reference: Tensor, logits: Tensor) -> Tensor:
    """float64 [S*C], whose products with others are the sum over samples of dz' H dz, H = diag(p) - pp' the Hessian of KL and cross-entropy.

    Args:
        reference: float64 [S, C], the float model's logits; `logits`: the quantized one's.
    """
    p, change = reference.softmax(1), logits - reference
    return (p.sqrt() * (change - (p * change).sum(1, keepdim=True))).flatten()


def loss_slope(reference: Tensor, logits: Tensor, targets: Tensor, who: str) -> Tensor:
    """Sum over samples of (p - y)'dz: what cross-entropy grows by in first order. `targets`: classes, or probabilities as the logits."""
    if targets.is_floating_point():
        wanted = as_logits(targets, who)
    else:
        wanted = F.one_hot(targets.reshape(-1), reference.shape[1]).double()
    if wanted.shape != reference.shape:
        raise ValueError(f"{who}: targets must be classes or probabilities of the model's outputs; got {list(targets.shape)}")
    return ((reference.softmax(1) - wanted) * (logits - reference)).sum()
