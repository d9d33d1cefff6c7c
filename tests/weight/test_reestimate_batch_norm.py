"""Re-estimated batch norms: the averages over the batches, and nothing else of the model."""

import pytest
import torch
from torch import nn

import quantize
from quantize import reestimate_batch_norm


def net():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5))
    return model.append(nn.BatchNorm1d(5, track_running_stats=False)).append(nn.BatchNorm1d(5))


def test_averages_over_the_batches():
    model, batches = net(), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    model[1].running_mean.fill_(1e30)  # nothing of before is left
    model[1].eval()
    modes = [m.training for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    assert reestimate_batch_norm(model, iter(batches)) is model
    outputs = [model[0](x) for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs]).mean(0))
    assert [m.training for m in model.modules()] == modes and model[1].momentum == 0.3 and model[6].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    first = [b.clone() for b in model.buffers()]
    reestimate_batch_norm(model, [(x, torch.zeros(8)) for x in batches])  # dropout draws nothing
    assert all(torch.equal(a, b) for a, b in zip(first, model.buffers(), strict=True))


def test_a_prepared_model_is_as_in_evaluation():
    model = quantize.prepare(net(), {"*": quantize.XNOR(), "0": None})
    x = torch.randn(64, 3, 8, 8)
    reestimate_batch_norm(model, [x]).eval()
    with torch.no_grad():
        y = model[:6](x)  # up to the last batch norm
        torch.testing.assert_close(model[6].running_mean, y.mean(0), rtol=1e-4, atol=1e-5)
        assert float(model(x).mean(0).abs().max()) < 1e-3


def test_errors_leave_the_model_as_it_was():
    model = net()
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(ValueError, match="reestimate_batch_norm: batches must hold something; got nothing"):
        reestimate_batch_norm(model, [])
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [torch.randn(4, 3, 8, 8), torch.randn(4, 7)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert model.training and model[1].momentum == 0.3
    with pytest.raises(TypeError, match="reestimate_batch_norm: model must be an nn.Module; got int"):
        reestimate_batch_norm(4, [])
    with pytest.raises(TypeError, match="reestimate_batch_norm: batches must be iterable; got NoneType"):
        reestimate_batch_norm(model, None)
    with pytest.raises(TypeError, match=r"reestimate_batch_norm: batches must be an iterable of inputs, .*; got one Tensor\[4, 3, 8, 8\]"):
        reestimate_batch_norm(model, torch.randn(4, 3, 8, 8))
    assert reestimate_batch_norm(nn.Linear(2, 2), [torch.randn(3, 2)]).training


def test_norms_that_are_not_reached_keep_theirs():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.other(x) if self.training else self.main(x)

    model = Branches()
    model.other(torch.randn(8, 3) * 5)
    before = {name: t.clone() for name, t in model.other.state_dict().items()}
    reestimate_batch_norm(model, [torch.randn(8, 3)])
    assert all(torch.equal(t, before[name]) for name, t in model.other.state_dict().items())
    assert model.main.num_batches_tracked == 1
