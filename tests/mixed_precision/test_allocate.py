"""The allocator against every assignment of small problems, and what it promises of large ones."""

import math
import time

import pytest
import torch
from allocation_problems import KINDS, assignments, matrix, objectives, sensitivity, totals

import quantize

BUDGETS = ("max_bytes", "max_bit_ops", "max_latency")


def check(s, limits: dict, latency=None, chosen=None):
    """Whether the answer is the least of all assignments within the limits, ties by bits; ValueError where there is none."""
    layers, choices = len(s.layers), len(s.choices)
    chosen = assignments(layers, choices) if chosen is None else chosen
    value = objectives(s.matrix, chosen, choices)
    tables = {"max_bytes": s.bytes, "max_bit_ops": s.bit_ops, "max_latency": latency}
    fits = torch.ones(len(chosen), dtype=torch.bool)
    for name, limit in limits.items():
        fits &= totals(tables[name], chosen) <= limit * (1 + 1e-14)
    if latency is not None:
        limits = limits | {"latency": latency}
    if not fits.any():
        with pytest.raises(ValueError, match="cannot be met together"):
            quantize.allocate(s, **limits)
        return None
    allocation = quantize.allocate(s, **limits)
    scale = s.matrix.abs().max().item()
    best = value[fits].min().item()
    assert allocation.objective == pytest.approx(best, rel=1e-9, abs=2e-12 * scale)
    assert allocation.lower_bound <= best + 5e-12 * scale
    assert allocation.lower_bound <= allocation.objective
    assert allocation.proven
    mine = torch.tensor([[s.choices.index(c) for c in allocation.choice.values()]])
    assert objectives(s.matrix, mine, choices).item() == pytest.approx(allocation.objective, abs=1e-12 * scale)
    for name, limit in limits.items():
        if name != "latency":
            assert totals(tables[name], mine).item() <= limit * (1 + 1e-14)
    bits = torch.tensor([[pair[0] for pair in s.choices]] * layers)
    ties = fits & (value <= best + 1e-14 * scale)
    assert totals(bits, mine).item() >= totals(bits, chosen[ties]).max().item()
    return allocation


def limit(table, share):
    low, high = table.amin(1).sum().item(), table.amax(1).sum().item()
    return low + share * (high - low)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force(kind, budgets, seed):
    """105 problems of 7 layers: integer bytes, bit operations of their own, real latencies."""
    g = torch.Generator().manual_seed(100 * budgets + seed)
    size = torch.randint(1, 40, (7, 1), generator=g)
    bytes = size * torch.tensor([2, 4, 8]) + torch.randint(0, 9, (7, 1), generator=g)
    bit_ops = torch.randint(1, 10**9, (7, 3), generator=g)
    latency = torch.rand(7, 3, generator=g, dtype=torch.float64) if budgets > 2 else None
    shares = 0.1 + 0.6 * torch.rand(3, generator=g)
    tables = [bytes, bit_ops, latency][:budgets]
    limits = {name: limit(t, s.item()) for name, t, s in zip(BUDGETS, tables, shares, strict=False)}
    check(sensitivity(matrix(kind, 7, 3, seed), 7, bytes=bytes, bit_ops=bit_ops), limits, latency)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "choices"), [(1, 1), (1, 4), (5, 1), (2, 5), (4, 4)])
def test_odd_shapes(kind, layers, choices):
    s = sensitivity(matrix(kind, layers, choices, 3), layers, choices)
    check(s, {})
    check(s, {"max_bytes": limit(s.bytes, 0.4)})


def test_impossible_together():
    """Each budget alone can be met: a layer is small or fast, and both limits want the other."""
    bytes, bit_ops = torch.tensor([[1, 9]] * 6), torch.tensor([[9, 1]] * 6)
    for kind in ("low_rank", "diagonal"):
        s = sensitivity(matrix(kind, 6, 2, 0), 6, 2, bytes=bytes, bit_ops=bit_ops)
        assert check(s, {"max_bytes": 20, "max_bit_ops": 32}) is None
        assert check(s, {"max_bytes": 30, "max_bit_ops": 30}) is not None


def test_several_budgets_have_a_needle():
    """One assignment meets both limits exactly; greedy starts do not."""
    g = torch.Generator().manual_seed(5)
    bytes, bit_ops = torch.randint(1, 1000, (2, 8, 3), generator=g)
    chosen = assignments(8, 3)
    costs = totals(bytes, chosen) / 1000 + totals(bit_ops, chosen) / 1000
    needle = chosen[costs.argsort()[40]]
    s = sensitivity(matrix("indefinite", 8, 3, 1), 8, bytes=bytes, bit_ops=bit_ops)
    assert check(s, {"max_bytes": totals(bytes, needle[None]).item(), "max_bit_ops": totals(bit_ops, needle[None]).item()}) is not None


def test_fixed_choices():
    s = sensitivity(matrix("indefinite", 6, 3, 2), 6)
    allocation = quantize.allocate(s, max_bytes=30, fixed={"layer*": (2, None), "layer[3-5]": (8, None), "layer4": (2, None)})
    assert [bits for bits, _ in allocation.choice.values()] == [2, 2, 2, 8, 2, 8]
    chosen = assignments(6, 3)
    chosen = chosen[(chosen[:, 1] == 2) & (totals(s.bytes, chosen) <= 24)]
    allocation = quantize.allocate(s, max_bytes=24, fixed={"layer1": [8, None]})
    assert allocation.choice["layer1"] == (8, None)
    assert allocation.objective == pytest.approx(objectives(s.matrix, chosen, 3).min().item())


def test_nothing_to_lose_is_all_bits():
    """A zero matrix: 8 bits everywhere, or as many as fit, to the last byte."""
    s = sensitivity(torch.zeros(60, 60), 20)
    assert set(quantize.allocate(s).choice.values()) == {(8, None)}
    tight = quantize.allocate(s, max_bytes=101)
    assert (tight.bytes, tight.objective, tight.lower_bound, tight.proven) == (100, 0, 0, True)


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e290])
def test_units_do_not_matter(factor):
    m = matrix("indefinite", 7, 3, 8)
    s, scaled = sensitivity(m, 7), sensitivity(m * factor, 7)
    assert quantize.allocate(s, max_bytes=31).choice == quantize.allocate(scaled, max_bytes=31).choice
    costs = sensitivity(m, 7, bytes=s.bytes.double() * factor)
    assert quantize.allocate(costs, max_bytes=31 * factor).choice == quantize.allocate(s, max_bytes=31).choice


def test_entries_of_very_different_size():
    m = matrix("indefinite", 6, 3, 4)
    spread = torch.logspace(-15, 15, 18, dtype=torch.float64)
    check(sensitivity(spread[:, None] * m * spread, 6), {"max_bytes": 25})


def test_costs_that_say_nothing():
    m = matrix("indefinite", 6, 3, 4)
    equal, none = torch.full((6, 3), 7), torch.zeros(6, 3, dtype=torch.long)
    for bytes, most in ((equal, 42), (none, 0), (none, math.inf)):
        assert quantize.allocate(sensitivity(m, 6, bytes=bytes), max_bytes=most).choice == quantize.allocate(sensitivity(m, 6)).choice


def test_a_limit_met_exactly():
    """Its own total, summed in another order, is a budget that an assignment meets."""
    latency = torch.rand(30, 3, dtype=torch.float64)
    s = sensitivity(matrix("low_rank", 30, 3, 0), 30)
    for total in (latency.amin(1).flip(0).sum().item(), latency.amin(1).sum().item(), math.fsum(latency.amin(1).tolist())):
        assert quantize.allocate(s, latency=latency, max_latency=total).latency == pytest.approx(total, rel=1e-14)


@pytest.mark.parametrize("kind", ["low_rank", "low_rank_indefinite"])
@pytest.mark.parametrize("budgets", [1, 2])
def test_proof_of_a_network(kind, budgets):
    """56 layers: proven, and no better where one layer or two are changed."""
    bytes = torch.tensor([16] * 19 + [64] * 18 + [256] * 19)[:, None] * torch.tensor([2, 4, 8]) * 18
    bit_ops = torch.randint(1, 1000, (56, 1)) * torch.tensor([4, 16, 64])
    s = sensitivity(matrix(kind, 56, 3, 0), 56, bytes=bytes, bit_ops=bit_ops)
    limits = {"max_bytes": limit(bytes, 0.25)} | ({"max_bit_ops": limit(bit_ops, 0.3)} if budgets > 1 else {})
    allocation = quantize.allocate(s, **limits, time_limit=120)
    assert allocation.proven and allocation.bytes <= limits["max_bytes"]
    assert budgets == 1 or allocation.bit_ops <= limits["max_bit_ops"]
    mine = torch.tensor([s.choices.index(c) for c in allocation.choice.values()])
    near = mine.repeat(20000, 1)
    for _ in range(2):
        near[torch.arange(20000), torch.randint(56, (20000,))] = torch.randint(3, (20000,))
    fits = totals(bytes, near) <= limits["max_bytes"]
    if budgets > 1:
        fits &= totals(bit_ops, near) <= limits["max_bit_ops"]
    assert objectives(s.matrix, near[fits], 3).min().item() >= allocation.objective - 1e-9 * abs(allocation.objective)
    again = quantize.allocate(s, **limits, time_limit=120)
    assert again.choice == allocation.choice and again.lower_bound == allocation.lower_bound


def test_without_cross_terms_large():
    """300 layers: the answer is proven, and within what Lagrange's relaxation leaves open, worked out here."""
    g = torch.Generator().manual_seed(0)
    value = torch.rand(300, 3, generator=g, dtype=torch.float64) * torch.tensor([16.0, 4.0, 1.0])
    bytes = torch.randint(100, 5000, (300, 1), generator=g) * torch.tensor([2, 4, 8])
    s = sensitivity(torch.diag(value.flatten()), 300, bytes=bytes)
    most = limit(bytes, 0.3)
    allocation = quantize.allocate(s, max_bytes=most, time_limit=120)
    assert allocation.proven and allocation.bytes <= most

    def lagrange(multiplier):
        choice = (value + multiplier * bytes).argmin(1)[None]
        return totals(bytes, choice).item(), totals(value, choice).item()

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if lagrange(middle)[0] > most else (low, middle)
    used, reached = lagrange(high)
    assert reached + high * (used - most) - 1e-9 <= allocation.objective <= reached


@pytest.mark.parametrize("layers", [10, 60])
def test_without_cross_terms_and_several_budgets(layers):
    """The lists, or where they grow too long the branch and bound, prove it; a budget more cannot make it better."""
    g = torch.Generator().manual_seed(1)
    value = torch.rand(layers, 3, generator=g, dtype=torch.float64) * torch.tensor([16.0, 4.0, 1.0])
    bytes = torch.randint(100, 5000, (layers, 1), generator=g) * torch.tensor([2, 4, 8])
    latency = torch.rand(layers, 3, generator=g, dtype=torch.float64)
    s = sensitivity(torch.diag(value.flatten()), layers, bytes=bytes)
    most, slowest = limit(bytes, 0.3), limit(latency, 0.3)
    if layers == 10:
        check(s, {"max_bytes": most, "max_latency": slowest}, latency)
    one = quantize.allocate(s, max_bytes=most, time_limit=120)
    both = quantize.allocate(s, max_bytes=most, latency=latency, max_latency=slowest, time_limit=120)
    assert one.proven and both.proven and both.latency <= slowest and both.bytes <= most
    assert both.objective >= one.objective


def test_thousand_variables():
    """200 layers of 5 choices: an answer and a bound that holds, in the time given."""
    s = sensitivity(matrix("low_rank", 200, 5, 0), 200, 5)
    begin = time.process_time()
    allocation = quantize.allocate(s, max_bytes=200 * 6, time_limit=2.0)
    assert time.process_time() - begin < 20
    assert allocation.bytes <= 1200 and allocation.lower_bound <= allocation.objective
