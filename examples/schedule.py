"""Learning rates as a function of the position in training, so a resumed run needs no scheduler state."""

import math
from collections.abc import Sequence


def learning_rate(kind: str, peak: float, epoch: float, epochs: int, warmup: float = 0, milestones: Sequence[int] = ()) -> float:
    """Rate at `epoch` (fractional) of `epochs`: linear growth over `warmup` epochs, then a cosine to zero, or a tenth at each milestone."""
    if epoch < warmup:
        return peak * epoch / warmup
    if kind == "step":
        return peak * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    return peak * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
