"""The nearest positive semidefinite matrix with a given diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS, TOLERANCE = 1000, 1e-10
FILLINGS, FILLING_ROUNDS = 8, 15  # of what is free; it need not be exact


def nearest_positive(matrix: Tensor, free: Tensor | None = None) -> Tensor:
    """Higham's alternating projections with Dykstra's correction (2002, algorithm 3.3), entries weighted by the diagonal.

    The weights make of the problem the nearest correlation matrix: an entry counts in units of the two values that it belongs to, so that
    the small ones of many bits are kept as well as the large ones. Rows of zero diagonal become zero. Entries that are `free` (bool, as
    the matrix) may become anything: each time they are filled in from the last projection, which never takes the others farther away.

    Raises:
        ValueError: a negative diagonal entry.
    """
    diagonal = matrix.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(
            f"projected: matrix must have no negative diagonal entries, which no positive semidefinite matrix has; got {diagonal.min():.3g}"
        )
    root = diagonal.sqrt()
    inside = root > 0
    inverse = torch.where(inside, 1 / root, 0)
    start = matrix * inverse[:, None] * inverse
    if free is not None and free.any():
        for _ in range(FILLINGS):
            start = torch.where(free, _project(start, inside, FILLING_ROUNDS), start)
    result = _project(start, inside, ROUNDS)
    # The rounds end a little outside the cone: a correlation matrix mixed with the identity keeps its diagonal.
    least = float(torch.linalg.eigvalsh(result)[0])
    if least < 0:
        identity = torch.diag(inside.to(result.dtype))
        result = (result - least * identity) / (1 - least)
    scaled = result * root[:, None] * root
    scaled.diagonal().copy_(diagonal)
    return scaled


def _project(start: Tensor, inside: Tensor, rounds: int) -> Tensor:
    result, correction = start.clone(), torch.zeros_like(start)
    for _ in range(rounds):
        lowered = result - correction
        values, vectors = torch.linalg.eigh(lowered)
        positive = (vectors * values.clamp(min=0)) @ vectors.T
        correction = positive - lowered
        after = positive.clone()
        after.diagonal().copy_(inside.to(after.dtype))
        change = (after - result).norm() / after.norm().clamp(min=1e-300)
        result = after
        if change < TOLERANCE:
            break
    return result
