"""Convolutions: forward bit-equal, gradients equal at exact levels, dx exact always, dW unbiased."""

import numpy as np
import pytest
import torch
from exact_levels import EXACT, assert_same, keeps, levels, run, twins

import quantize
from quantize import QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d

CASES = [  # class, arguments, keyword arguments, input
    (QConv1d, (4, 6, 3), {}, (3, 4, 20)),
    (QConv1d, (4, 6, 5), {"stride": 3, "padding": 2, "bias": False}, (3, 4, 31)),
    (QConv1d, (4, 4, 3), {"groups": 4, "padding": "same", "dilation": 2}, (2, 4, 17)),
    (QConv1d, (4, 6, 4), {"padding": "same"}, (2, 4, 17)),
    (QConv2d, (4, 6, 3), {}, (3, 4, 8, 9)),
    (QConv2d, (4, 6, 1), {"bias": False}, (3, 4, 7, 5)),
    (QConv2d, (4, 6, 3), {"stride": 2, "padding": 1}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, (3, 2)), {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, 3), {"groups": 2, "padding": 1}, (3, 4, 9, 8)),
    (QConv2d, (4, 8, 3), {"groups": 4, "padding": 1, "stride": 2}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, 3), {"padding": "same"}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, (4, 3)), {"padding": "same", "dilation": (1, 2)}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, 3), {"padding": "valid", "stride": 2}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (3, 4, 9, 8)),
    (QConv2d, (4, 6, 3), {"padding": "same", "padding_mode": "replicate"}, (3, 4, 9, 8)),
    (QConv3d, (2, 4, 3), {"padding": 1, "stride": (1, 2, 1)}, (2, 2, 5, 6, 7)),
    (QConv3d, (2, 4, (1, 2, 3)), {"padding": "same", "padding_mode": "circular"}, (2, 2, 5, 6, 7)),
    (QConvTranspose1d, (4, 6, 3), {"stride": 2}, (3, 4, 20)),
    (QConvTranspose2d, (4, 6, 3), {}, (3, 4, 5, 6)),
    (QConvTranspose2d, (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (3, 4, 5, 6)),
    (QConvTranspose2d, (4, 6, (3, 2)), {"stride": (3, 2), "dilation": (1, 2), "bias": False}, (3, 4, 5, 6)),
    (QConvTranspose3d, (2, 4, 2), {"stride": 2}, (2, 2, 3, 4, 5)),
]
IDS = [f"{cls.__name__}{args}{kwargs}" for cls, args, kwargs, _ in CASES]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), CASES, ids=IDS)
def test_same_as_plain_at_exact_levels(cls, args, kwargs, shape):
    plain, ours = twins(cls, *args, **kwargs)
    x = levels(*shape)
    saved = assert_same(ours, plain, x)
    assert keeps(saved, ours, x) == {torch.uint8}
    # One sample without the batch axis.
    assert_same(ours, plain, levels(*shape[1:], unbatched=True))
    # No sample at all.
    assert_same(ours, plain, torch.empty(0, *shape[1:]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), CASES, ids=IDS)
def test_frozen_weights_keep_nothing(cls, args, kwargs, shape):
    plain, ours = twins(cls, *args, **kwargs)
    for layer in (plain, ours):
        layer.weight.requires_grad_(False)
    x = levels(*shape)
    saved = assert_same(ours, plain, x)
    assert not keeps(saved, ours, x)


def test_transposed_output_size():
    plain, ours = twins(QConvTranspose2d, 4, 6, 3, stride=2, padding=1)
    for size in ([9, 11], [10, 12], torch.Size([2, 6, 10, 11])):
        assert_same(ours, plain, levels(2, 4, 5, 6), size)
    with pytest.raises(ValueError, match="output size"):
        ours(levels(2, 4, 5, 6), [20, 20])


@pytest.mark.parametrize("cls", [QConv2d, QConvTranspose2d])
def test_channels_last(cls):
    plain, ours = (layer.to(memory_format=torch.channels_last) for layer in twins(cls, 8, 6, 3))
    x = levels(3, 8, 9, 7).to(memory_format=torch.channels_last)
    saved = assert_same(ours, plain, x)
    assert keeps(saved, ours, x) == {torch.uint8}
    # Formats of input and weight may differ.
    assert_same(ours, plain, levels(3, 8, 9, 7))


def test_strided_and_expanded_inputs():
    plain, ours = twins(QConv2d, 4, 6, 3)
    assert_same(ours, plain, levels(6, 4, 9, 8)[::2])
    assert_same(ours, plain, levels(3, 1, 9, 8).expand(3, 4, 9, 8))
    assert_same(ours, plain, levels(3, 9, 8, 4).permute(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [QConv2d, QConvTranspose2d])
def test_autocast(cls, dtype):
    plain, ours = twins(cls, 8, 6, 3)
    x = levels(3, 8, 9, 7)
    with torch.autocast("cpu", dtype=dtype):
        saved = assert_same(ours, plain, x)
        assert ours(x).dtype == dtype
    assert keeps(saved, ours, x) <= {torch.uint8, dtype}
    assert sum(t.nbytes for t in saved if t.dtype == torch.uint8) == x.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    plain, ours = (layer.to(dtype) for layer in twins(QConv2d, 8, 6, 3))
    x = levels(3, 8, 9, 7, dtype=dtype)
    saved = assert_same(ours, plain, x)
    assert (torch.uint8 in keeps(saved, ours, x)) == (dtype != torch.float64)


def test_dx_and_bias_are_exact_at_any_bits():
    plain, ours = twins(QConv2d, 4, 6, 3, padding=1, config=quantize.ActivationConfig(bits=1, max_bits=1))
    x = torch.randn(3, 4, 9, 8)
    (y, (dx, dw, db), _), (expected, (exact_dx, exact_dw, exact_db), _) = run(ours, x), run(plain, x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, exact_dx)
    assert torch.equal(db, exact_db)
    assert not torch.equal(dw, exact_dw)


def test_no_gradients_no_cost():
    plain, ours = twins(QConv2d, 4, 6, 3, config=quantize.ActivationConfig(bits=1, max_bits=1))
    ours.eval()
    x = torch.randn(3, 4, 9, 8)
    before = torch.get_rng_state()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(ours(x), plain(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_double_backward_is_refused_by_name():
    _, ours = twins(QConv2d, 4, 6, 3)
    x = levels(3, 4, 9, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="conv: the backward of a layer with compressed activations is not differentiable"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


def test_backward_twice_gives_the_same():
    _, ours = twins(QConv2d, 4, 6, 3, config=quantize.ActivationConfig(bits=2, max_bits=2))
    y = ours(torch.randn(3, 4, 9, 8)).sum()
    first = torch.autograd.grad(y, ours.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, ours.weight)[0])


def test_a_disabled_layer_is_the_plain_one():
    plain, ours = twins(QConv2d, 4, 6, 3, config=quantize.ActivationConfig(enabled=False))
    x = torch.randn(3, 4, 9, 8)
    saved = assert_same(ours, plain, x)
    assert torch.float32 in {t.dtype for t in saved}


@pytest.mark.parametrize("cls", [QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d])
def test_config_must_be_one(cls):
    with pytest.raises(TypeError, match=f"{cls.__name__}: config must be an ActivationConfig; got 2"):
        cls(4, 6, 3, config=2)
    assert cls(4, 6, 3).config == quantize.ActivationConfig()
    assert cls(4, 6, 3, config=EXACT).config is EXACT


@pytest.mark.parametrize("integer", [np.int64, np.int32])
@pytest.mark.parametrize("cls", [QConv1d, QConv2d, QConvTranspose2d])
def test_numpys_integers_count(cls, integer):
    n = 1 if cls is QConv1d else 2
    one, two = integer(1), integer(2)
    layer = cls(3, 4, 3, stride=two, padding=(one,) * n, dilation=one)
    x = torch.randn(2, 3, *[9] * n)
    assert torch.equal(layer(x), type(layer).plain.forward(layer, x))
