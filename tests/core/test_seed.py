"""Seeds: a step that a CUDA graph would replay with the same noise is refused."""

import pytest
import torch
from torch import nn

import quantize


def step(model):
    model(torch.randn(4, 16)).sum().backward()


@pytest.mark.parametrize(
    "make",
    [
        quantize.QModule,
        lambda m: quantize.prepare(m, quantize.DiffQ()),
        lambda m: quantize.prepare(m, quantize.DiffQ(activation_bits="learned", noise="gaussian")),
        lambda m: quantize.prepare(m, quantize.DoReFa(2, None, 6)),
    ],
    ids=["activations", "diffq", "learned", "dorefa"],
)
def test_no_capture_in_a_cuda_graph(make, monkeypatch):
    model = make(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    step(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        step(model)
    with torch.no_grad():
        model.eval()(torch.randn(4, 16))
