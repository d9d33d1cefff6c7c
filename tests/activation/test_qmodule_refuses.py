"""What set_sample_indices() and load_activation_state() refuse; the model is then as before."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantize import ActivationConfig, QModule


def by_gradient():
    return QModule(nn.Sequential(nn.Linear(64, 16)), ActivationConfig(bits=2, use_gradient=True))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([1, 2**40]), ValueError, r"below 2\^28.*got 1099511627776"),
        (torch.tensor([3, -1]), ValueError, "numbers from 0; got -1"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"Tensor\[N\]; got shape \[2, 3\]"),
        (torch.arange(3, device="meta"), ValueError, "a dense Tensor with values; got one on meta"),
        (torch.arange(3).to_sparse(), ValueError, "a dense Tensor with values; got torch.sparse_coo"),
        (np.arange(3), TypeError, "an int64 or int32 Tensor; got ndarray"),
        (torch.arange(3).short(), TypeError, "an int64 or int32 Tensor; got torch.int16"),
        ([1, 2], TypeError, "an int64 or int32 Tensor; got list"),
    ],
)
def test_indices_are_checked(indices, error, message):
    model = by_gradient()
    with pytest.raises(error, match=f"^set_sample_indices: indices must be {message}"):
        model.set_sample_indices(indices)
    assert model._control.indices is None


CURVE = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([], TypeError, "state must map layer names to dictionaries; got list"),
        ({"0": 3}, TypeError, "state must map layer names to dictionaries; got int for '0'"),
        ({"0": None}, TypeError, "state must map layer names to dictionaries; got NoneType for '0'"),
        ({0: {}}, TypeError, "state must map layer names to dictionaries; got 0 as a name"),
        ({"0": {"budget": "x"}}, ValueError, "budget of layer '0' must be a number from 1 to 8; got 'x'"),
        ({"0": {"budget": 100}}, ValueError, "budget of layer '0' must be a number from 1 to 8; got 100"),
        ({"0": {"budget": float("nan")}}, ValueError, "budget of layer '0'"),
        ({"0": {"budget": True}}, ValueError, "budget of layer '0' must be a number from 1 to 8; got True"),
        ({"0": {"curve": [1.0]}}, ValueError, "curve of layer '0' must be None or a list of 9 finite numbers"),
        ({"0": {"curve": [float("inf")] * 9}}, ValueError, "curve of layer '0'"),
        ({"0": {"curve": [-1.0] * 9}}, ValueError, "curve of layer '0' must be None or a list of 9 finite numbers from 0"),
        ({"0": {"curve": [10**400] * 9}}, ValueError, "curve of layer '0'"),
        ({"0": {"updates": -1}}, ValueError, "updates of layer '0' must be an integer from 0 to 2.63 - 1; got -1"),
        ({"0": {"updates": None}}, ValueError, "updates of layer '0' must be an integer from 0 to 2.63 - 1; got None"),
        ({"0": {"steps": 2**80}}, ValueError, "steps of layer '0' must be an integer from 0 to 2.63 - 1; got 1208"),
        ({"0": {"elements": 0.5}}, ValueError, "elements of layer '0' must be an integer from 0 to 2.63 - 1; got 0.5"),
        ({"0": {"elements": True}}, ValueError, "elements of layer '0'"),
        ({"0": {"sample_weight": torch.ones(3, 3)}}, ValueError, r"sample_weight of layer '0' .*; got a torch.float32 Tensor\[3, 3\]"),
        ({"0": {"sample_weight": torch.ones(3, device="meta")}}, ValueError, r"sample_weight of layer '0' .* on meta"),
        ({"0": {"sample_weight": torch.ones(3).to_sparse()}}, ValueError, r"sample_weight of layer '0' .*; got .*torch.sparse_coo"),
        ({"0": {"sample_weight": -torch.ones(3)}}, ValueError, "sample_weight of layer '0' .* of numbers from 0 or NaN"),
        ({"0": {"bits": 3}}, ValueError, "layer '0' must have no entries but budget, .*; got 'bits'"),
        ({"0": {3: 3}}, ValueError, "layer '0' must have no entries but budget, .*; got 3"),
        *(
            ({"0": {"budget": 4.0}, name: {}}, ValueError, f"layers that the model lacks: .'{name}'.")
            for name in ("1", "#", "a#1", "mul#0", "")
        ),
    ],
)
def test_activation_states_are_checked(state, error, message):
    model = by_gradient()
    good = {"0": {"budget": 3.0, "curve": CURVE, "steps": 7, "sample_weight": torch.tensor([1.0, torch.nan])}}
    model.load_activation_state(good)
    before, names = str(model.activation_state()), model.layer_bits().keys()
    with pytest.raises(error, match=f"^load_activation_state: .*{message}"):
        model.load_activation_state(state if not isinstance(state, dict) else {"0": {"budget": 5.0}, "mul#1": {"steps": 3}, **state})
    assert str(model.activation_state()) == before and model.layer_bits().keys() == names
    model.load_activation_state(QModule(nn.Sequential(nn.Linear(64, 16))).activation_state())


def test_numpys_numbers_will_do():
    model = by_gradient()
    model.load_activation_state({"0": {"steps": np.int64(3), "budget": np.float32(2.5), "curve": tuple(np.array(CURVE))}})
    learned = model.activation_state()["0"]
    assert (learned["steps"], learned["budget"], learned["curve"]) == (3, 2.5, CURVE)
    assert (type(learned["steps"]), type(learned["budget"]), type(learned["curve"][0])) == (int, float, float)


class Everything(nn.Module):
    """All calls that have states, of weights that no module owns."""

    def forward(self, x):
        weight, scale = torch.ones(4, 4, 1, 1, requires_grad=True), torch.ones(4, requires_grad=True)
        x = F.conv_transpose2d(F.conv2d(x, weight), weight)
        x = F.batch_norm(x, None, None, scale, training=True)
        x = F.mish(F.hardswish(F.silu(x))) * x.mean((2, 3), keepdim=True).sigmoid()
        return F.linear(F.gelu(F.gelu(x, approximate="tanh")), torch.ones(2, x.shape[-1], requires_grad=True))


def test_names_of_calls_are_known_before_the_first():
    model, fresh = QModule(Everything()), QModule(Everything())
    model(torch.randn(2, 4, 8, 8, requires_grad=True)).sum().backward()
    state = model.activation_state()
    assert {name.split("#")[0] for name in state} == {
        "conv", "conv_transpose", "batch_norm", "silu", "hardswish", "mish", "mul", "gelu", "linear"
    }  # fmt: skip
    fresh.load_activation_state(state)
    assert str(fresh.activation_state()) == str(state)
