"""allocate_bits against all assignments of small problems."""

import itertools
import random

import pytest
import torch

WIDTHS = (1, 2, 4, 8)


def allocate(variance, budget, max_bits=8):
    return torch.ops.quantize.allocate_bits(torch.tensor(variance), budget, max_bits).tolist()


def total(variance, bits):
    return sum(row[WIDTHS.index(b)] for row, b in zip(variance, bits, strict=True))


def best(variance, budget, max_bits=8):
    allowed = [b for b in WIDTHS if b <= max_bits]
    choices = itertools.product(allowed, repeat=len(variance))
    return min(total(variance, bits) for bits in choices if sum(bits) <= budget)


def convex(generator, samples):
    """As range and noise make them: about a quarter of the variance with each bit, at scales far apart."""
    rows = []
    for _ in range(samples):
        scale = 10 ** generator.uniform(-4, 4)
        rows.append([scale * f * generator.uniform(0.95, 1.05) for f in (1.0, 1 / 9, 1 / 225, 1 / 65025)])
    return rows


def not_convex(generator, samples):
    """Anything that falls; also rows where the first bit gains next to nothing and the next ones a lot."""
    return [sorted((generator.random() for _ in WIDTHS), reverse=True) for _ in range(samples)]


@pytest.mark.parametrize("max_bits", [2, 4, 8])
@pytest.mark.parametrize("curves", [convex, not_convex])
def test_off_the_best_by_less_than_one_upgrade(curves, max_bits):
    generator = random.Random(1)
    for samples in (1, 2, 3, 5):
        variance = curves(generator, samples)
        for budget in range(samples, max_bits * samples + 3):
            bits = allocate(variance, budget, max_bits)
            assert set(bits) <= set(WIDTHS)
            assert max(bits) <= max_bits
            assert sum(bits) <= budget
            # What is left would buy nobody the next width.
            assert all(b == max_bits or b > budget - sum(bits) for b in bits)
            # The last upgrade that the relaxed problem takes in part is all there is to lose; a hull's upgrade may be worth a whole row.
            assert total(variance, bits) <= best(variance, budget, max_bits) + max(row[0] - row[-1] for row in variance)


def test_best_where_the_budget_ends_with_an_upgrade():
    generator = random.Random(2)
    for _ in range(8):
        variance = convex(generator, 5)
        upgrades = [((row[k] - row[k + 1]) / 2**k, 2**k) for row in variance for k in range(3)]
        budget = 5
        for _, cost in sorted(upgrades, reverse=True):
            budget += cost
            assert total(variance, allocate(variance, budget)) == pytest.approx(best(variance, budget), rel=1e-5)


def test_two_upgrades_are_seen_as_one_where_only_both_gain():
    # The second bit is worth little, the next two a lot: the first sample takes both before the second sample takes its first.
    assert allocate([[10.0, 9.9, 0.1, 0.0], [3.0, 1.0, 0.9, 0.8]], 5) == [4, 1]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poisoned_samples_leave_the_others_alone(poison):
    variance = [[poison] * 4, [1.0, 0.1, 0.01, 0.0], [100.0, 10.0, 1.0, 0.01]]
    bits = allocate(variance, 7)
    assert sum(bits) <= 7
    assert bits[2] >= bits[1] >= bits[0] == 1


def test_large_and_equal_samples_share_alike():
    bits = torch.ops.quantize.allocate_bits(torch.tensor([[1.0, 0.1, 0.01, 0.001]]).repeat(1001, 1), 2002, 8)
    assert (bits == 2).all()


def test_nothing_to_allocate():
    assert torch.ops.quantize.allocate_bits(torch.empty(0, 4), 0, 8).shape == (0,)


def test_strided_variance():
    variance = torch.rand(4, 6).t()
    assert allocate(variance.tolist(), 12) == torch.ops.quantize.allocate_bits(variance, 12, 8).tolist()


@pytest.mark.parametrize("max_bits", [1, 2, 4, 8])
def test_curve_is_what_allocating_leaves(max_bits):
    averages = [1.0, 1.125, 1.5, 2.0, 3.0, 8.0]
    for samples in (1, 7, 128):
        variance, cost = torch.rand(2, samples, 4).sort(2, descending=True)[0]
        curve = torch.ops.quantize.allocation_curve(variance, cost, averages, max_bits)
        for average, got in zip(averages, curve.tolist(), strict=True):
            if average > max_bits:
                assert got == 0
                continue
            bits = torch.ops.quantize.allocate_bits(variance, round(average * samples), max_bits)
            assert got == pytest.approx(float(cost.double().gather(1, bits.long().log2().long()[:, None]).sum()), rel=1e-6)


def test_curve_names_bad_input():
    with pytest.raises(ValueError, match="allocation_curve: cost must have 8 elements; got"):
        torch.ops.quantize.allocation_curve(torch.rand(2, 4), torch.rand(3, 4), [1.0], 8)
