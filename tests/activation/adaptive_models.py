"""A small network whose samples differ, and a training step: for the tests of adaptive bits."""

import torch
import torch.nn.functional as F
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip


def batch(n=32):
    """Images of very different contrast, and their classes."""
    return torch.randn(n, 3, 16, 16) * torch.logspace(-1, 1, n)[:, None, None, None], torch.arange(n) % 4


def step(model, x, target, weight=None):
    loss = F.cross_entropy(model(x), target, reduction="none")
    (loss if weight is None else loss * weight).mean().backward()


def bits_in_use(model):
    """Bits of each sample in each lossy layer: what the allocation decided last."""
    return {s.name: s.used.clone() for s in model._control.states() if isinstance(s.used, torch.Tensor)}
