"""The ReLU family and dropout: everything exact, one bit an element kept."""

import pytest
import torch
import torch.nn.functional as F
from exact_levels import assert_same, keeps, run, twins
from torch import nn

import quantize
from quantize import QDropout, QLeakyReLU, QReLU, QReLU6

INPLACE = pytest.mark.parametrize("inplace", [False, True])
LAYERS = pytest.mark.parametrize(("cls", "args"), [(QReLU, ()), (QReLU6, ()), (QLeakyReLU, ()), (QLeakyReLU, (0.3,))])
SHAPES = [(), (1,), (7,), (0, 3), (3, 151), (2, 3, 9, 7), (2, 3, 4, 5, 6)]


def awkward(shape, dtype=torch.float32):
    """Both zeros, infinities, what lies at ReLU6's upper end, and what is almost zero."""
    x = torch.randn(shape) * 4
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 6.0, 6.001, 1e-45, -1e-45])
    x.view(-1)[: min(len(special), x.numel())] = special[: x.numel()]
    return x.to(dtype)


@INPLACE
@LAYERS
def test_same_as_plain(cls, args, inplace):
    plain, ours = twins(cls, *args, inplace=inplace)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            x = awkward(shape, dtype)
            saved = assert_same(ours, plain, x)
            if dtype != torch.float64 and x.numel():
                assert sum(t.nbytes for t in saved) == (x.numel() + 7) // 8
                assert {t.dtype for t in saved} == {torch.uint8}


@INPLACE
@LAYERS
def test_memory_formats(cls, args, inplace):
    plain, ours = twins(cls, *args, inplace=inplace)
    for x in (
        torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last),
        torch.randn(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d),
        torch.randn(2, 9, 7, 8).permute(0, 3, 1, 2),
        torch.randn(30, 40).t(),
        torch.randn(3, 1).expand(3, 70),
    ):
        assert_same(ours, plain, x)


@INPLACE
def test_views_and_slices(inplace):
    # The input of an in-place ReLU may be part of a tensor; the rest of it stays.
    for take in (lambda x: x[:, 1], lambda x: x[1], lambda x: x.view(2, -1), lambda x: x.transpose(1, 2), lambda x: x[:, :, ::2]):
        results = []
        for layer in (nn.ReLU(inplace), QReLU(inplace)):
            torch.manual_seed(0)
            leaf = torch.randn(2, 3, 8, requires_grad=True)
            base = leaf * 1
            y = layer(take(base))
            (y.sum() + (base * 2).sum()).backward()
            results.append((y.detach(), base.detach(), leaf.grad))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


def test_nan_is_kept_and_passes_its_gradient():
    for cls in (QReLU, QReLU6):
        plain, ours = twins(cls)
        x = torch.tensor([torch.nan, 1.0, -1.0])
        assert_same(ours, plain, x)
        assert run(ours, x)[1][0][0] != 0
    assert QLeakyReLU()(torch.tensor([torch.nan], requires_grad=True)).isnan().all()
    x = torch.tensor([torch.nan, 0.5, 2.0, -1.0], requires_grad=True)
    torch.ops.quantize.clip(x, -1.0, 1.0, 0.0).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_in_place_on_a_leaf_is_refused_as_by_pytorch():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        QReLU(inplace=True)(x)


def test_in_place_on_a_saved_tensor_is_noticed():
    x = torch.randn(4, requires_grad=True)
    y = x.exp()  # keeps its output
    QReLU(inplace=True)(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_returns_its_input():
    x = torch.randn(4, 4, requires_grad=True) * 1
    assert QReLU(inplace=True)(x) is x
    assert F.relu(x).equal(x)


def test_negative_slope_below_zero_falls_back():
    plain, ours = twins(QLeakyReLU, -0.5)
    assert_same(ours, plain, torch.randn(3, 50))


def test_negative_slope_zero_is_a_relu():
    plain, ours = twins(QLeakyReLU, 0.0)
    assert_same(ours, plain, torch.randn(3, 50))


@LAYERS
def test_integers_and_no_gradients(cls, args):
    plain, ours = twins(cls, *args)
    x = awkward((3, 151))
    with torch.no_grad():
        assert torch.equal(ours(x.clone().requires_grad_()), plain(x))
    if cls is QReLU:
        assert torch.equal(ours(torch.arange(-3, 3)), plain(torch.arange(-3, 3)))


def test_disabled():
    ours = QReLU(config=quantize.ActivationConfig(enabled=False))
    assert torch.float32 in {t.dtype for t in assert_same(ours, nn.ReLU(), torch.randn(3, 50))}


@pytest.mark.parametrize(("layer", "name"), [(QReLU(), "relu or hardtanh"), (QDropout(), "dropout")])
def test_double_backward_is_refused_by_name(layer, name):
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name}: the backward of a layer with compressed activations is not differentiable"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


# ---------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 22 / 97, 0.5, 0.9, 1.0])  # 22/97: 1 / (1 - p) in float32 depends on how it is computed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dropout_is_pytorchs_under_the_same_seed(p, dtype):
    for x in (torch.randn(3, 151), torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last), torch.randn(()), torch.randn(30, 40).t()):
        results = []
        for layer in (nn.Dropout(p), QDropout(p)):
            torch.manual_seed(3)
            results.append(run(layer, x.to(dtype)))
            after = torch.rand(1)
        (expected, (exact,), _), (y, (grad,), saved) = results
        assert torch.equal(y, expected)
        torch.testing.assert_close(grad, exact, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)
        if p not in (0.0, 1.0):
            assert sum(t.nbytes for t in saved) == (x.numel() + 7) // 8
        torch.manual_seed(3)
        nn.Dropout(p)(x.to(dtype).requires_grad_())
        assert torch.equal(after, torch.rand(1))  # as many numbers drawn


def test_dropout_in_evaluation_and_in_place():
    x = torch.randn(3, 151, requires_grad=True)
    assert QDropout(0.5).eval()(x) is x
    torch.manual_seed(0)
    expected = nn.Dropout(0.5, inplace=True)(x * 1)
    torch.manual_seed(0)
    assert torch.equal(QDropout(0.5, inplace=True)(x * 1), expected)


def test_dropout_keeps_at_most_a_byte_an_element_in_place():
    layer = QDropout(0.5, inplace=True)
    x = torch.randn(64, 1000)
    assert sum(t.nbytes for t in run(layer, x)[2]) <= x.numel()


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_bad_probability(p):
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        QDropout(p)
    with pytest.raises(ValueError, match="dropout: p must be between 0 and 1"):
        torch.ops.quantize.dropout(torch.randn(3), p)


def test_keeps_knows_masks():
    x = torch.randn(3, 151)
    assert keeps(run(QReLU(), x)[2], QReLU(), x) == {torch.uint8}
