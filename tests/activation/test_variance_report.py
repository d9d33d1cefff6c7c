"""variance_report: unbiased estimators with the properties that the formulas promise."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from quantize import ActivationConfig, QModule


def network(drop=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(drop), nn.Flatten(), nn.Linear(8 * 64, 4)
    )  # fmt: skip


def batches(count=3, n=16):
    return [(torch.randn(n, 3, 8, 8), torch.randint(4, (n,))) for _ in range(count)]


def report(bits, data, model=None, **more):
    model = copy.deepcopy(model) if model is not None else network()
    return quantize.variance_report(QModule(model, ActivationConfig(bits=bits, max_bits=bits)), data, F.cross_entropy, **more)


def test_fewer_bits_more_variance():
    model, data = network(), batches()
    one, two, four, eight = (report(bits, data, model) for bits in (1, 2, 4, 8))
    assert one.quantization > 4 * two.quantization > 4 * 4 * four.quantization
    assert two.quantization > 1000 * eight.quantization
    for r in (one, two, four, eight):
        assert r.overall == r.quantization + r.sample
        assert r.sample == pytest.approx(one.sample, rel=1e-6)
        assert all(isinstance(v, float) and math.isfinite(v) and v >= 0 for v in r)


def test_of_a_linear_layer_it_is_the_formula():
    # Var(dW) = sum_n (sum_i Var x_ni) ||g_n||^2 (DESIGN), g here 1/N for each output. Null: the report's expectation. Its deviation over
    # 400 draws of 256 independent elements is sqrt(2 / (400 * 256)), 0.44 %; 6 of them: false alarms 2e-9.
    model = QModule(nn.Sequential(nn.Linear(256, 4)), ActivationConfig(bits=2, max_bits=2))
    x = torch.randn(8, 256)
    got = quantize.variance_report(model, [(x, torch.zeros(8))], lambda y, _: y.sum() / 8, draws=400)
    variance = torch.ops.quantize.group_variance(x, 256)[:, 1].sum()
    assert got.quantization == pytest.approx(float(variance) * 4 / 64, rel=0.027)
    assert got.sample == 0


def test_sample_variance_is_the_formula():
    model, data = (
        QModule(nn.Sequential(nn.Linear(8, 1, bias=False)), ActivationConfig(enabled=False)),
        [(torch.randn(4, 8), torch.zeros(4)) for _ in range(5)],
    )
    got = quantize.variance_report(model, data, lambda y, _: y.sum())
    gradients = torch.stack([x.sum(0) for x, _ in data])
    assert got.sample == pytest.approx(float((gradients - gradients.mean(0)).square().sum(1).mean()), rel=1e-5)
    assert got.quantization == 0


def test_exact_levels_have_no_quantization_variance():
    x = torch.randint(4, (8, 256)).float()
    x[:, 0], x[:, 1] = 0.0, 3.0
    model = QModule(nn.Sequential(nn.Linear(256, 4)), ActivationConfig(bits=2, max_bits=2))
    assert quantize.variance_report(model, [(x, torch.zeros(8).long())], F.cross_entropy).quantization < 1e-12


def test_all_draws_have_the_same_dropout():
    data = batches()
    assert report(8, data, network(0.5)).quantization < 1e-3 * report(2, data, network(0.5)).quantization
    off = quantize.variance_report(QModule(network(0.5), ActivationConfig(enabled=False)), data, F.cross_entropy)
    assert off.quantization == 0
    assert off.sample > 0


def test_adaptive_bits_beat_fixed_ones():
    model = network()
    data = [(x * torch.logspace(-1, 1, 16)[:, None, None, None], y) for x, y in batches()]
    fixed = report(2, data, model)
    for config in (
        ActivationConfig(bits=2, per_layer=False),
        ActivationConfig(bits=2),
        ActivationConfig(bits=2, use_gradient=True),
    ):
        adaptive = quantize.variance_report(QModule(copy.deepcopy(model), config), data, F.cross_entropy)
        assert adaptive.quantization < 0.8 * fixed.quantization
        assert adaptive.sample == pytest.approx(fixed.sample, rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [ActivationConfig(bits=2, max_bits=2), ActivationConfig(bits=2, use_gradient=True), {"*": ActivationConfig(bits=2), "0": None}],
    ids=["fixed", "adaptive", "mapping"],
)
def test_nothing_changes(config):
    model, data = QModule(network(0.2), config), batches()
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
    before, learned = copy.deepcopy(model.state_dict()), str(model.activation_state())
    bits, generator, grads = model.layer_bits(), torch.get_rng_state(), [p.grad.clone() for p in model.parameters()]
    first = quantize.variance_report(model, data, F.cross_entropy, draws=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.layer_bits() == bits
    assert str(model.activation_state()) == learned
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert quantize.variance_report(model, data, F.cross_entropy, draws=2) == first


def test_frozen_parameters_and_layers_by_hand():
    model = nn.Sequential(quantize.QLinear(64, 8, config=ActivationConfig(bits=2, max_bits=2)), nn.Linear(8, 4))
    model[1].requires_grad_(False)
    data = [(torch.randn(8, 64), torch.randint(4, (8,))) for _ in range(2)]
    assert quantize.variance_report(model, data, F.cross_entropy).quantization > 0


def test_it_prints():
    r = report(2, batches(2), draws=1)
    assert str(r) == f"Overall Var = {r.overall:.6g}   Quant Var = {r.quantization:.6g}   Sample Var = {r.sample:.6g}"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches must hold at least one"),
        ({"batches": [torch.ones(3)]}, TypeError, r"batches must hold \(input, target\) pairs; got Tensor"),
        ({"batches": [(torch.ones(3), 1), (1, 2, 3)]}, TypeError, "batches must hold"),
        ({"batches": 3}, TypeError, "batches"),
        ({"draws": 0}, ValueError, "draws must be an integer of at least 1; got 0"),
        ({"draws": "x"}, TypeError, "draws must be an integer of at least 1; got 'x'"),
        ({"draws": True}, TypeError, "draws must be an integer of at least 1; got True"),
        ({"model": "x"}, TypeError, "model must be an nn.Module; got str"),
        ({"loss_fn": None}, TypeError, "loss_fn must be callable; got None"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {"model": QModule(network()), "batches": batches(1), "loss_fn": F.cross_entropy, **changes}
    with pytest.raises(error, match=f"variance_report: {message}"):
        quantize.variance_report(**arguments)


def test_a_model_without_gradients_is_named():
    with pytest.raises(ValueError, match="variance_report: model must have parameters that require gradients; it has none"):
        report(2, batches(1), network().requires_grad_(False))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"variance_report: model must not be run in torch.inference_mode"):
        report(2, batches(1))


@pytest.mark.parametrize("config", [ActivationConfig(bits=2), ActivationConfig(bits=2, use_gradient=True)], ids=["layers", "gradient"])
def test_bits_settle_wherever_the_qmodule_is(config):
    model, data = QModule(network(), config), [(x * torch.logspace(-1, 1, 16)[:, None, None, None], y) for x, y in batches()]
    inside = nn.Sequential(nn.Identity(), copy.deepcopy(model))
    want, got = (quantize.variance_report(m, data, F.cross_entropy, draws=3) for m in (model, inside))
    assert got == want
    assert inside[1].activation_state() == model.activation_state()


def test_numpys_integers_will_do():
    data = batches(1)
    assert report(2, data, draws=np.int64(1)).quantization > 0


def test_its_own_steps_teach_whatever_came_before(monkeypatch):
    model, taught = QModule(network(), ActivationConfig()), []
    for state in model._control.states():
        state.steps = 1001
    monkeypatch.setattr("quantize.activation.control.update_curve", lambda state, curve: taught.append(state.name))
    quantize.variance_report(model, batches(2), F.cross_entropy, draws=1)
    assert taught.count("0") >= 12
    assert {state.steps for state in model._control.states()} == {1001}
