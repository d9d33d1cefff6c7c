"""Sums behind binary convolutions: computed with them, the same to the bit, and only where nothing comes between."""

import copy
import gc
import weakref

import pytest
import torch
from packed_models import inside
from test_binary_layers import block, layers_of, trained_norms
from torch import nn

import quantize
from quantize.packed.pending import Pending


class Residual(nn.Module):
    """bn-clip-conv and what `join(conv's output, x)` makes of it."""

    def __init__(self, join, channels=16, tail=()):
        super().__init__()
        self.join, self.path = join, nn.Sequential(*block(channels, channels), *tail)

    def forward(self, x):
        return self.join(self.path(x), x)


def added_in_place(out, x):
    out += x
    return out


def in_place_on_the_other(out, x):
    x = x * 1
    x += out
    return x


def changed_before(out, x):
    x = x * 2
    return out + x


def packed(join, **options):
    model = trained_norms(Residual(join, **options)).eval()
    return quantize.convert(quantize.prepare(model, quantize.XNOR()))


def without_sums(model):
    plain = copy.deepcopy(model)
    for layer in layers_of(plain):
        layer._steps = ()
    return plain


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("join", [lambda out, x: out + x, lambda out, x: x + out, added_in_place])
def test_sum_is_part_of_the_layer(join, layout):
    model, x = packed(join), torch.randn(2, 16, 9, 9).contiguous(memory_format=layout)
    (layer,) = layers_of(model)
    assert layer._steps == ("add",)
    before = x.clone()
    with torch.no_grad():
        assert type(part := model.path(x)) is torch.Tensor  # called by itself
        with inside(model):
            assert isinstance(model.path(x), Pending)
        out = model(x)
    assert type(out) is torch.Tensor and torch.equal(out, without_sums(model)(x)) and out.stride() == x.stride()
    assert torch.equal(part, without_sums(model).path(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("join", [in_place_on_the_other, changed_before, lambda out, x: out * 2, lambda out, x: out + 1.0])
def test_what_is_not_right_behind_it_is_not(join):
    model = packed(join)
    assert not layers_of(model)[0]._steps
    assert type(model(torch.randn(2, 16, 9, 9))) is torch.Tensor


def test_folded_norm_between():
    model, x = packed(lambda out, x: out + x, tail=(nn.BatchNorm2d(16),)), torch.randn(2, 16, 9, 9)
    assert type(model.path[3]) is nn.Identity and layers_of(model)[0]._steps
    assert torch.equal(model(x), without_sums(model)(x))


def test_files_and_copies(tmp_path):
    model, x = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9)
    quantize.save(model, tmp_path / "model.safetensors")
    loaded = quantize.load(trained_norms(Residual(lambda out, x: out + x)).eval(), tmp_path / "model.safetensors")
    for other in (loaded, copy.deepcopy(model)):
        assert layers_of(other)[0]._steps and torch.equal(other(x), model(x))


def test_hooks_see_the_output():
    model, x, seen = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9), []
    want = without_sums(model)(x)
    layers_of(model)[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(model(x), want) and torch.equal(seen[0] + x, want)


@pytest.mark.parametrize(
    "use",
    [
        lambda out: torch.relu(out),
        lambda out: out * 2,
        lambda out: out + 1.5,
        lambda out: out + torch.ones(16, 1, 1),
        lambda out: 2 - out,
        lambda out: out.mean((2, 3)),
        lambda out: torch.cat([out, out]),
        lambda out: torch.add(out, torch.ones(9), alpha=2),
        lambda out: nn.functional.max_pool2d(out, 3),
        lambda out: out[0],
        lambda out: torch.tensor(list(out.shape)),
        lambda out: out + nn.Parameter(torch.ones(2, 16, 9, 9)),
    ],
)
def test_other_uses_compute_it_first(use):
    model, x = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9)
    want = without_sums(model).path(x)
    with inside(model):
        pending = model.path(x)
    assert isinstance(pending, Pending) and torch.equal(use(pending), use(want))


def test_two_of_them():
    model, x = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9)
    want = without_sums(model).path(x)
    with inside(model):
        assert torch.equal(model.path(x) + model.path(x), want + want)
        assert torch.equal(torch.add(model.path(x), model.path(x)), want + want)


def test_gradient_of_the_shortcut():
    model, x = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9)
    with inside(model):
        out = model.path(x)
    shortcut = torch.randn(2, 16, 9, 9, requires_grad=True)
    (out + shortcut).sum().backward()
    assert torch.equal(shortcut.grad, torch.ones_like(shortcut))


def test_empty_batches_and_other_dtypes():
    model, x = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9)
    assert model(x[:0]).shape == (0, 16, 9, 9)
    with torch.no_grad(), inside(model):
        assert isinstance(model.path(x), Pending)
        for dtype in (torch.bfloat16, torch.float64):
            shortcut = torch.randn_like(x, dtype=dtype)
            shortcut[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
            want = without_sums(model).path(x) + shortcut
            got = model.path(x) + shortcut
            assert got.dtype == want.dtype and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_layer_that_is_called_twice():
    model = trained_norms(Residual(lambda out, x: out + x)).eval()
    again = nn.Sequential(model, model)
    prepared = quantize.convert(quantize.prepare(again, quantize.XNOR()))
    x = torch.randn(2, 16, 9, 9)
    assert torch.equal(prepared(x), without_sums(prepared)(x))


def test_layers_with_hooks_are_freed():
    model, x = packed(lambda out, x: out + x), torch.randn(2, 16, 9, 9)
    model(x)
    (layer,) = layers_of(model)
    layer.register_forward_hook(lambda module, args, output, own=layer: None)  # a cycle, as hooks often are
    model(x)
    seen = weakref.ref(layer)
    del model, layer
    gc.collect()
    assert seen() is None
