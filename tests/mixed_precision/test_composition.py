"""Composed pairs and saturated sensitivities, against the formulas written out."""

import math

import pytest
import torch
from torch import nn

import quantize
from quantize.mixed_precision.composition import composed_pairs

CHOICES = [(2, 4), (4, 8), (8, 8)]


def kl(reference, logits):
    p = reference.softmax(1)
    return float((p * (p.log() - logits.log_softmax(1))).sum())


def parts(reference, change):
    """The share of the signal that is lost, and what is added."""
    signal, change = reference - reference.mean(1, keepdim=True), change - change.mean(1, keepdim=True)
    share = min(max(-float((change * signal).sum() / signal.square().sum()), 0.0), 1.0)
    return signal, share, change + share * signal


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    reference = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    changes = torch.randn(6, 5, 4, generator=generator, dtype=torch.float64)
    changes[1] -= 2 * reference  # more than all of the signal
    changes[3] -= 0.7 * reference
    return reference, changes


def test_pairs_are_what_the_formula_says(logits):
    reference, changes = logits
    found = composed_pairs(reference, changes, range(6))
    for a in range(6):
        for b in range(6):
            signal, lost_a, added_a = parts(reference, changes[a])
            _, lost_b, added_b = parts(reference, changes[b])
            if a == b:
                expected = kl(reference, reference + changes[a])
            elif a < b:
                both = (1 - lost_a) * (1 - lost_b) * signal + (1 - lost_b) * added_a + (1 - lost_a) * added_b
                expected = kl(reference, both)
            else:
                expected = 0.0
            assert float(found[a, b]) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_rows_of_several_processes_add_up(logits):
    parts = [composed_pairs(*logits, range(rank, 6, 2)) for rank in range(2)]
    assert torch.equal(sum(parts), composed_pairs(*logits, range(6)))


def test_a_model_without_signal():
    found = composed_pairs(torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 2, 3, dtype=torch.float64), range(2))
    assert torch.equal(found, torch.zeros(2, 2, dtype=torch.float64))


@pytest.fixture
def measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    batches = [(torch.randn(16, 12), torch.randint(5, (16,))) for _ in range(2)]
    return {
        method: quantize.measure_sensitivity(model, batches, CHOICES, method, progress=False)
        for method in ("composed", "clado", "diagonal")
    }


def test_composed_is_exact_for_single_layers(measured):
    composed, diagonal = measured["composed"], measured["diagonal"]
    assert composed.link == "log1p" and composed.method == "composed"
    torch.testing.assert_close(composed.values.expm1(), diagonal.values, rtol=1e-9, atol=1e-12)


def test_composed_is_positive_so_that_no_budget_means_the_most_bits(measured):
    """Unlike measured pairs, whose logarithms need the projection."""
    composed, most = measured["composed"], dict.fromkeys(("0", "2", "4"), (8, 8))
    assert float(torch.linalg.eigvalsh(composed.matrix)[0]) > -1e-12
    assert -1e-12 < quantize.allocate(composed).objective <= math.log1p(composed.predict(most)) * (1 + 1e-6)


def test_where_changes_are_small_it_is_gauss_newton():
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    batches, fine = [(torch.randn(32, 12), torch.randint(5, (32,)))], [(7, None), (8, None)]
    composed, newton = (
        quantize.measure_sensitivity(model, batches, fine, method, progress=False).matrix for method in ("composed", "gauss_newton")
    )
    off = ~torch.block_diag(*[torch.ones(2, 2)] * 3).bool()
    assert float((composed - newton)[off].norm() / newton[off].norm()) < 0.02


def test_saturated_pairs_are_logarithms_of_pairs(measured):
    pairs = measured["clado"]
    saturated = pairs.saturated()
    assert saturated.link == "log1p" and saturated.saturated() is saturated
    assert pairs.link == "identity"
    for a, b in ((0, 3), (1, 8), (4, 6)):
        growth = float(pairs.matrix[a, a] + pairs.matrix[b, b] + 2 * pairs.matrix[a, b])
        together = float(saturated.matrix[a, a] + saturated.matrix[b, b] + 2 * saturated.matrix[a, b])
        assert together == pytest.approx(math.log1p(growth), rel=1e-12)


def test_predict_undoes_the_logarithm():
    matrix = torch.diag(torch.tensor([math.log1p(2.0), math.log1p(0.5)]).double())
    sizes = torch.ones(2, 1)
    sensitivity = quantize.Sensitivity(["a", "b"], [(2, None)], matrix, sizes, sizes, link="log1p")
    assert sensitivity.predict({"a": (2, None), "b": (2, None)}) == pytest.approx(3 * 1.5 - 1)


def test_the_link_is_saved(measured, tmp_path):
    path = tmp_path / "composed.safetensors"
    measured["composed"].save(path)
    loaded = quantize.Sensitivity.load(path)
    assert loaded.link == "log1p" and torch.equal(loaded.matrix, measured["composed"].matrix)


def test_bad_links_are_named():
    sizes = torch.ones(1, 1)
    with pytest.raises(ValueError, match="link must be one of 'identity', 'log1p'; got 'sqrt'"):
        quantize.Sensitivity(["a"], [(2, None)], torch.ones(1, 1), sizes, sizes, link="sqrt")
    falling = quantize.Sensitivity(["a"], [(2, None)], -torch.ones(1, 1), sizes, sizes)
    with pytest.raises(ValueError, match="growths above -1"):
        falling.saturated()
    with pytest.raises(ValueError, match='metric must be "kl" with method "composed"'):
        model = nn.Sequential(nn.Linear(4, 2))
        quantize.measure_sensitivity(model, [(torch.randn(2, 4), torch.zeros(2).long())], CHOICES, "composed", "loss")
