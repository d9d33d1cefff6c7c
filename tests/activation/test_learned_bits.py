"""What adaptive bits learn: from which steps, over checkpoints, and in spite of steps that go wrong."""

import copy

import pytest
import torch
from adaptive_models import batch, network, step

from quantize import ActivationConfig, QModule
from quantize.activation import allocation


def test_manual_seed_reproduces_training():
    plain, (x, target) = network(), batch()
    ends = []
    for _ in range(2):
        model = QModule(copy.deepcopy(plain), ActivationConfig(bits=2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(7)
        for _ in range(8):
            optimizer.zero_grad()
            step(model, x, target)
            optimizer.step()
        ends.append(model)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert ends[0].layer_bits() == ends[1].layer_bits()


def test_learned_bits_survive_a_checkpoint():
    x, target = batch()
    model = QModule(network(), ActivationConfig(bits=2, use_gradient=True))
    for _ in range(6):
        model.set_sample_indices(torch.arange(len(x)))
        step(model, x, target)
    state = copy.deepcopy(model.activation_state())
    other = QModule(network(), ActivationConfig(bits=2, use_gradient=True))
    other.load_state_dict(model.state_dict())
    other.load_activation_state(state)
    for m in (model, other):
        torch.manual_seed(5)
        m.zero_grad()
        m.set_sample_indices(torch.arange(len(x)))
        step(m, x, target)
    assert model.layer_bits() == other.layer_bits()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    with pytest.raises(ValueError, match="load_activation_state: state has layers that the model lacks: .'99'."):
        other.load_activation_state({"99": {}})


def test_few_of_many_steps_teach(monkeypatch):
    monkeypatch.setattr(allocation, "ALL_TEACH", 20)
    model, (x, target) = QModule(network()), batch(8)
    state, taught = model._control.layers[0], []
    for number in range(32):
        step(model, x, target)
        if state.records:
            taught.append(number)
    assert taught == [*range(20), 20, 24, 28]
    state = model.activation_state()["0"]
    assert (state["updates"], state["steps"]) == (23, 32)
    resumed = QModule(network())  # the next one to teach is the same after a checkpoint
    resumed.load_activation_state(model.activation_state())
    for each in (model, resumed):
        step(each, x, target)
        assert each._control.layers[0].records
        step(each, x, target)
        assert not each._control.layers[0].records


def test_every_step_teaches_about_samples():
    model, (x, target) = QModule(network(), ActivationConfig(use_gradient=True)), batch(8)
    for number in range(23):
        model.set_sample_indices(torch.arange(8) + 8 * number)
        step(model, x, target)
    known = model.activation_state()["0"]["sample_weight"][: 23 * 8]
    assert known.isfinite().all()


def test_forwards_without_backward_poison_and_overflow_leave_it_working():
    model = QModule(network(), ActivationConfig(bits=2))
    x, target = batch()
    for disturbance in ("none", "no backward", "NaN", "overflow", "evaluation", "none"):
        if disturbance == "no backward":
            model(x)
        elif disturbance == "NaN":
            bad = x.clone()
            bad[3] = torch.nan
            step(model, bad, target)
        elif disturbance == "overflow":
            step(model, x, target, torch.full((len(x),), 1e38))
        elif disturbance == "evaluation":
            with torch.no_grad():
                model(x)
        else:
            step(model, x, target)
        assert sum(model.layer_bits().values()) > 0
    model = QModule(network(), ActivationConfig(bits=2))
    for number in range(6):
        step(model, x * (torch.nan if number == 2 else 1.0), target)
    assert all(1 <= b <= 8 for b in model.layer_bits().values())
    assert max(model.layer_bits().values()) > min(model.layer_bits().values())


class Late:
    """The event behind figures that are still on their way from a GPU."""

    def query(self):
        return False


def test_figures_that_nobody_takes_are_not_made(monkeypatch):
    model = QModule(network(), ActivationConfig(bits=2, use_gradient=True))
    x, y = batch(8)
    model.set_sample_indices(torch.arange(8))
    step(model, x, y)
    model._control.arriving = [([].append, torch.empty(0), Late())]
    monkeypatch.setattr("quantize.activation.allocation._curve", lambda *_: pytest.fail("one step's figures are under way"))
    model._control.begin_step()
    assert all(s.records == [] and s.curve is None for s in model._control.states())
    assert any(s.sample_weight is not None and s.sample_weight.isfinite().all() for s in model._control.states())
