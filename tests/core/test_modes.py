"""evaluating: each module's own mode comes back, whatever happens."""

import pytest
from torch import nn

from quantize.modes import evaluating


def test_modes_of_modules_come_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        model[1][1].train()
        raise KeyError
    assert [module.training for module in model.modules()] == before
