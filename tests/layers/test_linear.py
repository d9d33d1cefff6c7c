"""Linear: inputs of any rank, equal to plain at exact levels, exact dx, and the variance that the formula says."""

import pytest
import torch
import torch.nn.functional as F
from exact_levels import assert_same, keeps, levels, run, twins

import quantize
from quantize import QConv2d, QLinear

SHAPES = [(40,), (5, 40), (3, 4, 40), (2, 3, 4, 40), (1, 40), (0, 40), (3, 0, 40)]


def close(dtype=torch.float32):
    """Our product is rows.t() @ input, theirs may sum in another order."""
    return {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_plain_at_exact_levels(shape, bias):
    plain, ours = twins(QLinear, 40, 7, bias=bias)
    x = levels(*shape)
    saved = assert_same(ours, plain, x, **close())
    assert keeps(saved, ours, x) == ({torch.uint8} if x.numel() else keeps(run(plain, x)[2], plain, x))


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_weights_keep_nothing(shape):
    plain, ours = twins(QLinear, 40, 7)
    for layer in (plain, ours):
        layer.weight.requires_grad_(False)
    x = levels(*shape)
    saved = assert_same(ours, plain, x, **close())
    assert not keeps(saved, ours, x) or not x.numel()


def test_only_the_bias_trains():
    plain, ours = twins(QLinear, 40, 7)
    for layer in (plain, ours):
        layer.weight.requires_grad_(False)
    x = levels(5, 40)
    grad = torch.randn(5, 7)
    (got,), (want,) = (torch.autograd.grad(layer(x), layer.bias, grad) for layer in (ours, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_frozen_weights(bias):
    plain, ours = twins(QLinear, 40, 7, bias=bias)
    x, grad = torch.randn(5, 40, requires_grad=True), torch.randn(5, 7)
    for layer in (plain, ours):
        layer.requires_grad_(False)
    (got,), (want,) = (torch.autograd.grad(layer(x), x, grad) for layer in (ours, plain))
    assert torch.equal(got, want)


def test_autocasts_copy_of_the_weight_is_kept_where_it_is_needed():
    model = quantize.QModule(torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)))
    with torch.autocast("cpu", torch.bfloat16):
        assert quantize.memory_report(model, torch.randn(3, 256)).saved_bytes < 256 * 3
        assert quantize.memory_report(model, torch.randn(3, 256, requires_grad=True)).saved_bytes >= 256 * 256 * 2


@pytest.mark.parametrize("features", [1, 2, 3])
def test_tiny_samples_never_take_more_than_fp32(features):
    plain, ours = twins(QLinear, features, 4, config=quantize.ActivationConfig(bits=2, max_bits=2))
    x = torch.randn(64, features)
    saved = run(ours, x)[2]
    kept = sum(t.nbytes for t in saved if t.shape != ours.weight.shape)
    assert kept <= x.nbytes + 16  # the seed
    if features == 1:
        assert_same(ours, plain, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    plain, ours = twins(QLinear, 40, 7)
    with torch.autocast("cpu", dtype=dtype):
        saved = assert_same(ours, plain, levels(3, 4, 40), **close(dtype))
    assert sum(t.nbytes for t in saved if t.dtype == torch.uint8) == 480


def test_strided_and_expanded_inputs():
    plain, ours = twins(QLinear, 40, 7)
    assert_same(ours, plain, levels(5, 40).t().contiguous().t(), **close())
    assert_same(ours, plain, levels(1, 40).expand(5, 40), **close())
    assert_same(ours, plain, levels(3, 4, 40).transpose(0, 1).contiguous().transpose(0, 1), **close())


def test_output_gradient_that_is_expanded():
    plain, ours = twins(QLinear, 40, 7)
    x = levels(5, 40)
    for layer in (plain, ours):
        layer(x).sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


def test_double_backward_is_refused_by_name():
    _, ours = twins(QLinear, 40, 7)
    x = levels(3, 40).requires_grad_()
    with pytest.raises(RuntimeError, match="linear: the backward of a layer with compressed activations is not differentiable"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


# ---------------------------------------------------------------------------------------------------------------- the noise


def element_variance(x, bits):
    """s^2 p(1-p) of float32 [N, ...] packed with a range a sample."""
    _, ranges = torch.ops.quantize.group_quantize(x, bits, 0, torch.zeros(2, dtype=torch.int64))
    low, scale = ranges.view(torch.bfloat16).double().view(-1, 2, *[1] * (x.dim() - 1)).unbind(1)
    p = (x.double() - low) / scale
    p = p - p.floor()
    return scale**2 * p * (1 - p)


def draw_weight_gradients(layer, x, grad, draws):
    """`draws` weight gradients, float64 [draws, *weight.shape]."""
    return torch.stack([torch.autograd.grad(layer(x), layer.weight, grad)[0] for _ in range(draws)]).double()


def assert_unbiased(drawn, exact, squares):
    """Null: `exact` is the mean, and `squares` the mean squared distance to it. Each of the elements' and the distance's z, with deviations
    as drawn, within 6: false alarms 2e-9 for each of up to 161. And 1 % of the distance for noise that elements share."""
    deviation = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() <= 6 * deviation + 1e-6 * exact.abs().max()).all()
    distances = (drawn - exact).square().flatten(1).sum(1)
    assert abs(float(distances.mean()) - squares) <= 6 * float(distances.std()) / len(drawn) ** 0.5 + 0.01 * squares


def test_linear_weight_gradient_is_unbiased_with_the_formulas_variance():
    # Var(dW) = sum_n (sum_i Var x_ni) ||g_n||^2 (DESIGN, "Gradient variance"), and element by element.
    layer = QLinear(40, 4, bias=False, config=quantize.ActivationConfig(bits=2, max_bits=2, group_size="sample"))
    x, grad, draws = torch.randn(6, 40) * torch.tensor([1.0, 3, 0.1, 2, 1, 1])[:, None], torch.randn(6, 4), 1000
    exact, drawn = grad.t() @ x, draw_weight_gradients(layer, x, grad, draws)
    variance, energy = element_variance(x, 2), grad.double().square()
    assert_unbiased(drawn, exact, float((variance.sum(1) * energy.sum(1)).sum()))
    assert ((drawn.mean(0) - exact).abs() <= 6 * (energy.t() @ variance / draws).sqrt() + 1e-4).all()


def test_conv_weight_gradient_is_unbiased_with_the_formulas_variance():
    # Var(dW) = sum Var(x) * conv_transpose(sum_co g^2, 1) (DESIGN). Elements 64 apart in memory share noise, which is worth under 1 %.
    layer = QConv2d(3, 4, 3, stride=2, padding=1, bias=False, config=quantize.ActivationConfig(bits=2, max_bits=2, group_size="sample"))
    x, grad = torch.randn(4, 3, 9, 8), torch.randn(4, 4, 5, 4)
    (exact,) = torch.autograd.grad(F.conv2d(x, layer.weight, None, 2, 1), layer.weight, grad)
    energy = grad.double().square().sum(1, keepdim=True)
    reach = F.conv_transpose2d(energy, torch.ones(1, 1, 3, 3).double(), None, 2, 1, output_padding=(0, 1))
    assert_unbiased(draw_weight_gradients(layer, x, grad, 1000), exact, float((element_variance(x, 2) * reach).sum()))


def test_an_override_of_any_argument_sees_the_call():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*(a.as_subclass(torch.Tensor) * 2 if isinstance(a, Doubled) else a for a in args), **(kwargs or {}))

    class Call(torch.nn.Module):
        def forward(self, x, w, b):
            return F.linear(x, w, b)

    x, w, b = torch.randn(3, 8), torch.zeros(5, 8, requires_grad=True), torch.ones(5).as_subclass(Doubled)
    assert torch.equal(quantize.QModule(Call())(x, w, b), torch.full((3, 5), 2.0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(6, 9, 40)[:, 1:3],
        lambda: torch.randn(3, 40, 49).transpose(1, 2),
        lambda: torch.randn(2, 6, 5, 40)[:, ::2],
        lambda: torch.randn(40, 3, 5).permute(1, 2, 0),
        lambda: torch.randn(1, 1, 40).expand(3, 5, 40),
    ],
    ids=["slices", "turned", "steps", "permuted", "expanded"],
)
def test_rows_with_gaps_between_them(view, bias):
    plain, ours = twins(QLinear, 40, 7, bias=bias)
    x = view()
    assert torch.equal(ours(x), plain(x))  # the products that torch.nn makes where the weight needs a gradient
    for layer in (plain, ours):
        layer(x).sum().backward()
    if bias:
        assert torch.allclose(ours.bias.grad, plain.bias.grad)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    for layer in (plain, ours):
        layer.weight.requires_grad_(False)
    x.requires_grad_()
    assert torch.equal(ours(x), plain(x))
