"""Allocation problems for tests, and every assignment of the small ones."""

import itertools

import torch

import quantize

WEIGHT_BITS = (2, 4, 8, 16, 32)


def sensitivity(matrix, layers, choices=3, bytes=None, bit_ops=None):
    """A Sensitivity by hand; costs are the bits of the choices, if not given."""
    pairs = [(bits, None) for bits in WEIGHT_BITS[:choices]]
    costs = torch.tensor([WEIGHT_BITS[:choices]] * layers)
    bytes = costs if bytes is None else bytes
    return quantize.Sensitivity(
        [f"layer{i}" for i in range(layers)], pairs, matrix, bytes, costs if bit_ops is None else bit_ops, configs=[None] * choices
    )


def matrix(kind: str, layers: int, choices: int, seed: int) -> torch.Tensor:
    """[LK, LK]. low_rank: dominant diagonal, cross terms of both signs, as networks have; wide: its size is 1000 times the cross terms'."""
    g = torch.Generator().manual_seed(seed)
    n = layers * choices
    a = torch.randn(n, n, generator=g, dtype=torch.float64)
    if kind == "positive":
        return a @ a.T
    if kind == "negative":
        return -a @ a.T
    if kind == "indefinite":
        return a + a.T
    if kind == "diagonal":
        return torch.diag(a.diagonal())
    if kind == "ties":  # few values, many equal objectives
        return torch.diag(torch.randint(0, 3, (n,), generator=g).double())
    own = (4.0 ** -torch.tensor(WEIGHT_BITS[:choices])).repeat(layers) * torch.randn(layers, generator=g).exp().repeat_interleave(choices)
    vectors = torch.nn.functional.normalize(torch.randn(n, 8, generator=g, dtype=torch.float64), dim=1) * (own.double() / 2).sqrt()[:, None]
    sign = torch.tensor([-1.0] * 3 + [1.0] * 5, dtype=torch.float64) if kind == "low_rank_indefinite" else 1
    low_rank = (vectors * sign) @ vectors.T
    return low_rank - torch.diag(low_rank.diagonal()) + torch.diag(own.double())


KINDS = ("positive", "negative", "indefinite", "diagonal", "ties", "low_rank", "low_rank_indefinite")


def assignments(layers: int, choices: int) -> torch.Tensor:
    """[K**L, L]: all of them."""
    return torch.tensor(list(itertools.product(range(choices), repeat=layers)))


def totals(table: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The sum over layers of each assignment's entries of [L, K]."""
    return table[torch.arange(table.shape[0]), chosen].sum(1)


def objectives(matrix: torch.Tensor, chosen: torch.Tensor, choices: int) -> torch.Tensor:
    """x' matrix x of each assignment."""
    at = chosen + choices * torch.arange(chosen.shape[1])
    return matrix[at[:, :, None], at[:, None, :]].sum((1, 2))
