"""What two layers do together, composed from what each does alone: pairs without their forward passes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def composed_pairs(reference: Tensor, changes: Tensor, rows: Iterable[int]) -> Tensor:
    """Sums of KL over samples: of each given row with all rows behind it, and its own on the diagonal; else zero.

    A layer at few bits takes a part of the signal away and adds something to it: with c the float logits less their mean over classes, its
    change of them is -a c + n, a the least-squares part within [0, 1], one for all samples. Of two layers the parts that are left multiply,
    and each one's addition loses the part that the other takes: c becomes (1 - a)(1 - b) c + (1 - b) n_a + (1 - a) n_b. Linear, as in
    Gauss-Newton, where both are small, but two layers that each destroy the signal do not count as twice the change. Two choices of one
    layer are composed too: they are never in force together, but belong to a matrix that is positive.

    Args:
        reference: float64 [N, C], the float model's logits. changes: float64 [L*K, N, C], of the logits by each layer's choices.
        rows: of the changes, those to be computed.

    Returns:
        float64 [L*K, L*K], with entries above the diagonal.
    """
    log = F.log_softmax(reference, 1)
    p, signal = log.exp(), reference - reference.mean(1, keepdim=True)
    changes = changes - changes.mean(2, keepdim=True)
    lost = -(changes * signal).sum((1, 2)) / signal.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    kept = (1 - lost.clamp(0, 1)).view(-1, 1, 1)
    added = changes + (1 - kept) * signal
    result = torch.zeros(len(changes), len(changes), dtype=torch.float64, device=reference.device)
    for row in rows:
        behind = slice(row + 1, None)
        logits = kept[row] * (kept[behind] * signal + added[behind]) + kept[behind] * added[row]
        alone = (kept[row] * signal + added[row]).unsqueeze(0)
        for place, found in ((behind, logits), (slice(row, row + 1), alone)):
            result[row, place] = (p * (log - F.log_softmax(found, 2))).sum((1, 2)).clamp(min=0)
    return result
