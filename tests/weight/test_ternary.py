"""Ternary weights against the paper's two equations, and on their way through prepare, convert and files."""

import pytest
import torch
from same_bits import assert_isas_agree
from torch import nn

import quantize
from quantize import Ternary, ternary


def twin(w):
    """Equations 5 and 6 of arXiv 1605.04711, for each row."""
    rows = w.float().reshape(len(w), -1)
    kept = rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True)
    alpha = torch.where(kept, rows.abs(), 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return (alpha * rows.sign() * kept).view(w.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 16, 3, 3), (5, 257), (64, 1, 3, 3)], ids=str)
def test_levels_and_scales(each_isa, shape, dtype):
    w = torch.randn(shape).to(dtype)
    got, want = ternary(w), twin(w)
    assert torch.equal(got.sign().float(), want.sign())
    torch.testing.assert_close(got.float(), want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    assert all(row.abs().unique().numel() <= 2 for row in got.reshape(len(w), -1))


def test_isas_agree():
    w = torch.randn(33, 1000)
    assert_isas_agree(lambda: [ternary(w)])


def test_gradient_goes_straight_through():
    w, grad = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    ternary(w).backward(grad)
    assert torch.equal(w.grad, grad)


def test_zeros_nan_vectors_and_other_types():
    assert torch.equal(ternary(torch.zeros(3, 4)), torch.zeros(3, 4))
    w = torch.ones(2, 4)
    w[0, 1] = torch.nan
    assert ternary(w)[0].isnan().all() and torch.equal(ternary(w)[1], torch.ones(4))
    assert torch.equal(ternary(torch.tensor([1.0, -1.0, 0.1])), torch.tensor([1.0, -1.0, 0.0]))
    for wrong in (torch.ones(2).int(), 3.0):
        with pytest.raises(TypeError, match="ternary: w must be a floating-point Tensor"):
            ternary(wrong)
    with pytest.raises(ValueError, match="ternary must have 2 bits and no least_squares"):
        torch.ops.quantize.channel_quantize(torch.ones(2, 2), "ternary", 4, False)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_from_training_to_a_file(tmp_path, activation_bits):
    def make():
        return nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))

    model = quantize.prepare(make(), Ternary(activation_bits))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, target = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    packed = quantize.convert(model.eval())
    torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)
    quantize.save(packed, tmp_path / "model.safetensors")
    loaded = quantize.load(make(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), packed(x)) and loaded[0].method == "ternary"
    assert loaded[4].codes.nbytes == 10 * 576 // 4 and loaded[4].scales.nbytes == 40


def test_bits_and_errors():
    model = quantize.prepare(nn.Linear(8, 4), Ternary())
    assert quantize.weight_bits(model) == {"weight": 2}
    with pytest.raises(ValueError, match="Ternary: activation_bits must be an integer from 2 to 8; got 1"):
        Ternary(1)
