"""size_report(), summary() and save() name layers that are not initialized and states that are no dense tensors."""

import pytest
import torch
from torch import nn

import quantize


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 3)])
def test_lazy_layers(lazy):
    for model in (nn.Sequential(nn.Linear(5, 6), lazy), quantize.prepare(nn.Sequential(nn.Linear(5, 6), lazy), {"0": quantize.Uniform(4)})):
        with pytest.raises(ValueError, match="^size_report: '1.bias' must be initialized; run a batch through the lazy layer first"):
            quantize.size_report(model)
        with pytest.raises(ValueError, match="^summary: '1.bias' must be initialized"):
            quantize.summary(model, torch.randn(2, 5))


STATES = {
    "sparse": (torch.eye(2).to_sparse(), "torch.sparse_coo"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested one"),
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_are_not_dense(kind, tmp_path):
    state, found = STATES[kind]
    packed = quantize.convert(quantize.prepare(nn.Sequential(nn.Linear(5, 6)), quantize.Uniform(4)))
    for model in (nn.Linear(5, 6), packed):
        model.register_buffer("z", state)
        with pytest.raises(ValueError, match=f"^size_report: 'z' must be a dense tensor; got {found}"):
            quantize.size_report(model)
    with pytest.raises(ValueError, match=f"^save: 'z' must be a dense tensor; got {found}"):
        quantize.save(packed, tmp_path / "m")
    assert not list(tmp_path.iterdir())
