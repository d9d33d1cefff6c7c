"""Inputs and models that prepared layers, optimizers and batch norms cannot take: named, and nothing has changed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import quantize

X = torch.randn(4, 3, 9, 9)


def prepared(**options):
    return quantize.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), quantize.Uniform(8, activation_bits=8, **options))


WRONG = [
    (torch.randint(1, 256, (2, 3, 8, 8)), TypeError, "Conv2d '0': input must be a floating-point Tensor; got int64"),
    (100 * torch.randn(2, 4, 8, 8), ValueError, r"Conv2d '0': input must be \[N, 3, H, W\] or \[3, H, W\]; got \[2, 4, 8, 8\]"),
    (X.double(), TypeError, "Conv2d '0': input must be float32, as the weight is; got float64"),
    (X[..., :2], ValueError, "Conv2d '0': input must be at least 3 x 3"),
    (X.numpy(), TypeError, "Conv2d '0': input must be a Tensor; got ndarray"),
    (None, TypeError, "Conv2d '0': input must be a Tensor; got NoneType"),
    (X * torch.nan, ValueError, "ActivationQuantizer of layer '0': input must be finite; got values from nan to nan"),
]


@pytest.mark.parametrize(("input", "error", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_a_refused_batch_starts_no_grid(input, error, message):
    model = prepared()
    for call in (lambda: model(input), lambda: quantize.calibrate(model, [input])):
        with pytest.raises(error, match=f"^{message}"):
            call()
        assert not model[0].activation_quantizer.initialized and float(model[0].activation_quantizer.step.detach()) == 1


@pytest.mark.parametrize("config", [quantize.XNOR(), quantize.DoReFa(2, 2), quantize.DiffQ(activation_bits="learned")], ids=str)
def test_other_methods_name_them_too(config):
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 4)), config)
    for input in (np.ones((2, 16), np.float32), None):
        with pytest.raises(TypeError, match=f"^Linear( '0')?: input must be a Tensor; got {type(input).__name__}"):
            model(input)


def test_compressed_and_prepared_layers_are_named():
    model = quantize.prepare(quantize.QModule(nn.Sequential(nn.Conv2d(3, 8, 3))), quantize.Uniform(4))
    with pytest.raises(ValueError, match=r"^QConv2d '0': input must be \[N, 3, H, W\]"):
        model(torch.randn(2, 4, 8, 8))
    with pytest.raises(TypeError, match="^QConv2d '0': input must be float32, as the weight is; got float64"):
        model(X.double())


def test_reestimation_keeps_the_statistics():
    x = torch.randn(64, 3) + 5
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = copy.deepcopy(model.state_dict())
    for batches, message in (
        ([x[:0], x], r"batches must hold samples; got inputs of shape \[0, 3\], number 0"),
        ([x, x * torch.nan], "batches must be finite in all batch norms; those of '0' are not"),
        ([()], "batches must hold inputs; got an empty tuple, number 0"),
    ):
        with pytest.raises(ValueError, match=f"^reestimate_batch_norm: {message}"):
            quantize.reestimate_batch_norm(model, batches)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="^calibrate: batches must hold inputs; got an empty list"):
        quantize.calibrate(prepared(), [[]])


def test_a_layers_own_activation_quantizer_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].activation_quantizer = own = nn.Identity()
    with pytest.raises(ValueError, match="^prepare: layer '1' must not have 'activation_quantizer' as an attribute of its own; rename it"):
        quantize.prepare(model, quantize.Uniform(8, activation_bits=8))
    assert model[1].activation_quantizer is own and type(model[0]) is nn.Linear
    assert quantize.prepare(model, quantize.Uniform(8))[1].activation_quantizer is own


# ------------------------------------------------------------------------------------------------------------ add_bit_parameters


def learned():
    return quantize.prepare(nn.Sequential(nn.Linear(8, 4)), quantize.DiffQ())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_steps_with_closures(kind):
    model, by_hand = learned(), learned()
    by_hand.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="^add_bit_parameters: optimizer must take one gradient a step; got LBFGS"):
        quantize.add_bit_parameters(torch.optim.LBFGS(model.parameters()), model)
    optimizer, other = (kind(m.parameters(), lr=0.1) for m in (model, by_hand))
    guard = quantize.add_bit_parameters(optimizer, model)
    quantize.add_bit_parameters(other, by_hand)
    called = []

    def closure(value=1.0):
        called.append(value)
        optimizer.zero_grad()
        loss = model(torch.full((2, 8), value)).square().sum() + quantize.size_penalty(model)
        loss.backward()
        return loss

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        torch.manual_seed(1)
        with torch.no_grad():
            loss = step()
        torch.manual_seed(1)
        other.zero_grad()
        expected = by_hand(torch.ones(2, 8)).square().sum() + quantize.size_penalty(by_hand)
        expected.backward()
        other.step()
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))
    before = copy.deepcopy(model.state_dict())
    optimizer.step(lambda: closure(torch.nan))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert called == [1.0, 1.0, pytest.approx(torch.nan, nan_ok=True)] and repr(guard) == "BitGuard(steps=3, skipped=1)"
    with pytest.raises(RuntimeError, match="must match|shapes cannot be multiplied"):
        optimizer.step(lambda: model(torch.ones(2, 9)))
    assert guard.steps == 3  # that was none
    optimizer.step(None)  # as accelerate calls it
    optimizer.step(closure=None)
    assert guard.steps == 5


def test_rates_that_are_no_numbers():
    with pytest.raises(ValueError, match="lr must be a finite number from 0; got inf"):
        quantize.add_bit_parameters(torch.optim.SGD(learned().parameters(), lr=0.1), learned(), lr=float("inf"))


class Locked(torch.optim.SGD):
    """Of one group only."""

    def add_param_group(self, group):
        if self.__dict__.get("param_groups"):
            raise RuntimeError("one group only")
        super().add_param_group(group)


def test_an_optimizer_that_refuses_the_bits_keeps_them():
    model = learned()
    optimizer = Locked(model.parameters(), lr=0.1)
    before = [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="one group only"):
        quantize.add_bit_parameters(optimizer, model)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(p) for p in group] for group in before]
    quantize.add_bit_parameters(torch.optim.Adam(model.parameters()), model)  # nothing says that they are taken
