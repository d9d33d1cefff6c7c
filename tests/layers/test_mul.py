"""Gates: the broadcast factor exact, the other packed; gradients equal at exact levels."""

import pytest
import torch
from exact_levels import EXACT, keeps, levels, run
from torch import nn

import quantize


class Gated(nn.Module):
    """`function` of its input and a parameter."""

    def __init__(self, function, shape):
        super().__init__()
        self.function, self.gate = function, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.function(x, self.gate)


def both(function, shape, x, config=EXACT):
    """What ours saved, after outputs and gradients were found equal to the plain model's."""
    plain = Gated(function, shape)
    y, grads, _ = run(plain, x)
    ours = quantize.QModule(plain, config)
    got, got_grads, saved = run(ours, x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        assert torch.equal(a, b)
    return keeps(saved, ours, x)


@pytest.mark.parametrize("function", [
    lambda x, g: x * g, lambda x, g: g * x, lambda x, g: torch.mul(x, g), lambda x, g: x.multiply(g), lambda x, g: x.mul(other=g),
    lambda x, g: x * g.sigmoid(), lambda x, g: x * g.expand_as(x), lambda x, g: (x + 0).mul_(g),
], ids=["x * g", "g * x", "torch.mul", "multiply", "keyword", "computed", "expanded", "in place"])  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 32, 1, 1), (32, 1, 1), (1, 1, 5, 6), (3, 1, 5, 6), (6,), ()])
def test_gates(function, shape):
    x = levels(3, 32, 5, 6)
    assert both(function, shape, x) == {torch.uint8}
    assert both(function, shape, x.to(memory_format=torch.channels_last)) == {torch.uint8}
    assert both(function, shape, levels(3, 32, 6, 5).transpose(2, 3)) == {torch.uint8}


def test_what_is_left_alone():
    x = levels(3, 4, 5, 6)
    assert both(lambda x, g: x * g.detach() + g, (4, 1, 1), x) == set()  # nobody asks for the gate's gradient
    assert both(lambda x, g: x * 2 + g, (4, 1, 1), x) == set()
    assert both(lambda x, g: x.double() * g, (4, 1, 1), x) >= {torch.float64}
    assert both(lambda x, g: torch.mul(x.detach(), g.detach(), out=torch.empty_like(x)) + g + x, (4, 1, 1), x) == set()
    assert both(lambda x, g: x[:0] * g, (4, 1, 1), x) == set()
    assert both(lambda x, g: g * x[:0], (4, 1, 1), x) == set()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_mixed_types(dtypes):
    # As under autocast: a half-precision activation by a float32 parameter.
    low, high = dtypes
    assert both(lambda x, g: x.to(low) * g.to(high), (32, 1, 1), levels(3, 32, 5, 6)) == {torch.uint8}
    assert both(lambda x, g: x.to(low) * g.sum().to(high), (32, 1, 1), levels(3, 32, 5, 6)) == ({torch.uint8} if low == high else {low})
    with pytest.raises(RuntimeError, match="must match the size"):
        quantize.QModule(Gated(torch.mul, (5, 1, 1)))(levels(3, 32, 5, 6))


@pytest.mark.parametrize("function", [
    lambda x, g: x * x[:, :1], lambda x, g: x * torch.ones(4, 1, 1),
    lambda x, g: x.mul(g.new_ones(2, 1, 4, 1, 1)),
])  # fmt: skip
def test_other_products_are_pytorch_s(function):
    x = levels(3, 4, 8, 9)
    plain = Gated(lambda x, g: function(x, g) + g, (4, 1, 1))
    y, grads, _ = run(plain, x)
    got, got_grads, _ = run(quantize.QModule(plain, EXACT), x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_scaled_weight_is_no_activation():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * self.gain, self.bias)

    plain = Scaled(4, 6, 3)
    plain.gain = nn.Parameter(torch.randn(6, 1, 1, 1))
    x = levels(3, 4, 8, 9)
    y, grads, _ = run(plain, x)
    got, got_grads, saved = run(quantize.QModule(plain, EXACT), x)
    assert torch.equal(got, y)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, grads, strict=True))
    assert any(t is plain.weight for t in saved)


def test_weight_norm_is_left_alone():
    plain = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3))
    x = levels(3, 4, 8, 9)
    y, grads, _ = run(plain.eval(), x)
    got, got_grads, _ = run(quantize.QModule(plain, EXACT), x)
    assert torch.equal(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gate_s_gradient_is_unbiased():
    # Null: the mean over 400 draws differs from the plain gradient by noise whose deviation is known exactly. Of 4 gates a false alarm at
    # five deviations: below 1e-5.
    x, grad = torch.randn(8, 4, 6, 6), torch.randn(8, 4, 6, 6)
    model = quantize.QModule(Gated(torch.mul, (4, 1, 1)), quantize.ActivationConfig(bits=2, max_bits=2, group_size=16))
    exact = (x * grad).sum((0, 2, 3))
    draws = torch.stack([torch.autograd.grad(model(x), model.gate, grad)[0].flatten() for _ in range(400)])
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 20).all()
    assert draws.std(0).min() > 0


def test_adaptive_bits_learn_from_gates():
    model = quantize.QModule(Gated(torch.mul, (4, 1, 1)), quantize.ActivationConfig(bits=2))
    x = torch.randn(8, 4, 16, 16) * torch.logspace(-2, 1, 8)[:, None, None, None]
    for _ in range(3):
        model(x).square().sum().backward()
    (state,) = model._control.functional.values()
    model._control.begin_step()
    assert state.updates == 3
    assert all(a > b > 0 for a, b in zip(state.curve, state.curve[1:], strict=False))
    assert state.used[-1] > state.used[0]
