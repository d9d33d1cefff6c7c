"""The class of a converted model: a subclass of its own, whatever the root is, and whatever is made of it later."""

import abc
import copy

import pytest
import torch
import torch.nn.functional as F
from copies import through_pickle
from saved import saved_dtypes
from torch import nn

import quantize
from quantize import ActivationConfig, QModule

FIXED = ActivationConfig(bits=2, max_bits=2)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(8, 3), (4, 8)),
        (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
        (nn.ReLU(), (4, 8)),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (4, 8)),
        (nn.Sequential(), (4, 8)),
        (nn.Identity(), (4, 8)),
        (nn.ModuleDict({"a": nn.Linear(8, 8)})["a"], (4, 8)),
        (quantize.QLinear(8, 3), (4, 8)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_roots(model, shape):
    model = copy.deepcopy(model)
    kind = type(model)
    ours = QModule(model, FIXED)
    assert ours is model
    assert isinstance(ours, kind)
    x = torch.randn(shape, requires_grad=True)
    y = ours(x)
    y.sum().backward()
    assert x.grad is not None
    assert ours.config == FIXED if kind is not quantize.QLinear else True
    assert through_pickle(ours)(x).shape == y.shape
    assert set(ours.layer_bits().values()) <= {2.0}


def test_sequential_keeps_its_manners():
    model = QModule(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), FIXED)
    assert len(model) == 3
    assert isinstance(model[0], quantize.QLinear)
    assert isinstance(model[:2], nn.Sequential)
    assert model[:2](torch.randn(2, 4)).shape == (2, 4)
    assert type(model[:2]) is nn.Sequential
    assert torch.uint8 in saved_dtypes(model[:2], torch.randn(2, 4))
    model.append(nn.Linear(2, 1))
    assert model(torch.randn(2, 4)).shape == (2, 1)


def test_a_model_with_a_config_of_its_own_keeps_it():
    class Configured(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)

    model = QModule(Configured({"hidden": 4}), FIXED)
    assert model.config == {"hidden": 4}
    assert model.activation_config == FIXED
    assert copy.deepcopy(model).config == {"hidden": 4}
    model(torch.randn(2, 4)).sum().backward()


def test_classes_with_a_metaclass_of_their_own():
    class Abstract(nn.Module, abc.ABC):
        @abc.abstractmethod
        def forward(self, x): ...

    class Concrete(Abstract):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(x)

    model = QModule(Concrete(), FIXED)
    assert isinstance(model, Abstract)
    assert isinstance(type(model)(), Concrete)
    assert torch.uint8 in saved_dtypes(copy.deepcopy(model), torch.randn(2, 8))


class Gated(nn.Module):
    """With a parameter of the root's own."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.SiLU())

    def forward(self, x):
        return F.linear(self.inner(x), self.weight)


@pytest.mark.parametrize("parametrization", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_a_class_on_top_of_the_converted_one(parametrization):
    model = QModule(Gated(), ActivationConfig(bits=2, max_bits=2))
    parametrization(model, "weight")
    x = torch.randn(4, 64, 8)
    for config in (ActivationConfig(bits=4, max_bits=4), ActivationConfig()):
        assert QModule(model, config) is model and model.config == config
        model(x).sum().backward()
        assert copy.deepcopy(model)(x).shape == (4, 64, 8)
    assert set(model.layer_bits()) >= {"inner.0"}
    assert type(type(model)()) is Gated  # calling the class makes a plain model
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        through_pickle(model)
    nn.utils.parametrize.remove_parametrizations(model, "weight")
    assert type(copy.deepcopy(model)) is type(model)
