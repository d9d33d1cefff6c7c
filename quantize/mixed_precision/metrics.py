"""How far a quantized model is from the float one: the metrics of sensitivities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses import checked_loss


def as_logits(output, who: str) -> Tensor:
    """The model's output as float64 [samples, classes]; classes are dimension 1. TypeError or ValueError for what is none."""
    output = getattr(output, "logits", output)  # of Hugging Face's models
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"{who}: model must return logits, a floating-point Tensor[N, classes, ...]; got {found}")
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(f"{who}: model must return logits [N, classes, ...] of at least 2 classes; got {list(output.shape)}")
    if not bool(output.isfinite().all()):
        raise ValueError(f"{who}: model's outputs must be finite; got {int((~output.isfinite()).sum())} values that are NaN or infinite")
    return output.movedim(1, -1).reshape(-1, output.shape[1]).double()


def refuse_classes_last(output, targets, who: str) -> None:
    """ValueError for logits of tokens whose classes are the last dimension, as the classes in `targets` tell."""
    logits = getattr(output, "logits", output)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not isinstance(logits, Tensor) or logits.dim() < 3:
        return
    if targets.shape == logits.shape[:-1] and targets.shape != logits[:, 0].shape:
        raise ValueError(
            f"{who}: model must return logits [N, classes, ...]; got {list(logits.shape)} for targets {list(targets.shape)}, with classes "
            "last: return logits.movedim(-1, 1)"
        )


def as_probabilities(targets, logits: Tensor, who: str) -> Tensor:
    """Classes, or probabilities shaped as the model's output, as float64 [samples, classes]. TypeError or ValueError for others."""
    if not isinstance(targets, Tensor) or targets.is_complex() or targets.dtype == torch.bool:
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{who}: targets must be a Tensor of classes or probabilities; got {found}")
    if targets.is_floating_point():
        wanted = as_logits(targets, who) if targets.dim() > 1 else targets
    else:
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"{who}: targets must be classes from 0 to {logits.shape[1] - 1}; got {low if low < 0 else high}")
        wanted = F.one_hot(targets.reshape(-1).long(), logits.shape[1]).double()
    if wanted.shape != logits.shape:
        raise ValueError(f"{who}: targets must be classes or probabilities of the model's outputs; got {list(targets.shape)}")
    return wanted


def cross_entropy(output, targets, who: str = "measure_sensitivity") -> Tensor:
    """Mean over samples (and positions) of the cross-entropy in nats."""
    logits = as_logits(output, who)
    return F.cross_entropy(logits, as_probabilities(targets, logits, who))


class KL:
    """KL(float || quantized) in nats, mean over samples (and positions, where the output has them)."""

    def __init__(self, output, targets, samples: int, who: str):
        self.who = who
        refuse_classes_last(output, targets, who)
        self.log = F.log_softmax(as_logits(output, who), 1)
        self.samples = len(self.log)

    def __call__(self, output, chosen: str) -> Tensor:
        """The sum over samples. `chosen`: the layers at few bits and their choices, for errors."""
        return (self.log.exp() * (self.log - F.log_softmax(as_logits(output, self.who), 1))).sum()


class Loss:
    """The growth of a loss that is a mean over samples, of which the batch has `samples`."""

    def __init__(self, output, targets, samples: int, who: str, loss_fn: Callable):
        self.loss_fn, self.targets, self.samples, self.who = loss_fn, targets, samples, who
        self.reference = self._loss(output, " of the float model")

    def _loss(self, output, of: str) -> Tensor:
        if isinstance(output, Tensor) and output.is_floating_point():
            output = output.double()
        return checked_loss(self.who, self.loss_fn(output, self.targets), of).double()

    def __call__(self, output, chosen: str) -> Tensor:
        """The sum over samples. `chosen`: the layers at few bits and their choices, for errors."""
        return self.samples * (self._loss(output, f" with {chosen}") - self.reference)


def gauss_newton_features(reference: Tensor, changes: Tensor) -> Tensor:
    """Rows whose products are the sum over samples of dz' H dz, H = diag(p) - pp', KL's and cross-entropy's Hessian.

    Args:
        reference: float64 [S, C], the float model's logits. changes: float64 [M, S, C], of these logits.

    Returns:
        float64 [M, S*C].
    """
    p = reference.softmax(1)
    return (p.sqrt() * (changes - (p * changes).sum(2, keepdim=True))).flatten(1)


def loss_slope(reference: Tensor, changes: Tensor, targets: Tensor, who: str) -> Tensor:
    """float64 [M]: sum over samples of (p - y)'dz, what cross-entropy grows by in first order. `targets`: classes, or probabilities."""
    return ((reference.softmax(1) - as_probabilities(targets, reference, who)) * changes).sum((1, 2))
