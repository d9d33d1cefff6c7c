"""Max pools of converted models: the plain ones' outputs and errors, without the search for indices."""

import copy
import pickle

import pytest
import torch
from torch import nn

import quantize
from quantize import QModule, Uniform
from quantize.packed.pools import PackedMaxPool2d


def network(*window, **options):
    pool = nn.MaxPool2d(*window, **options)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), pool, nn.ReLU(), nn.Conv2d(16, 4, 1))


def packed(*window, **options):
    return quantize.convert(quantize.prepare(network(*window, **options), Uniform(8)))


def plain(model):
    """The same model with torch.nn's pools."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, PackedMaxPool2d):
            module.__class__ = nn.MaxPool2d
    return copied


@pytest.mark.parametrize(
    ("window", "options"),
    [((2,), {}), ((3, 2, 1), {}), (([3], [2], [1]), {}), (((3, 2),), {"stride": 3, "dilation": 2, "ceil_mode": True})],
    ids=str,
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_the_plain_pools(window, options, form):
    model = packed(*window, **options)
    x = torch.randn(2, 3, 13, 18).contiguous(memory_format=form)
    for own in (x, x[0], x[:0], x.relu()):
        y, want = model(own), plain(model)(own)
        assert torch.equal(y, want) and y.stride() == want.stride()
    x[0, 0, 4, 4] = torch.nan
    torch.testing.assert_close(model(x), plain(model)(x), rtol=0, atol=0, equal_nan=True)


def test_they_stay_pools(tmp_path):
    model, x = packed(2), torch.randn(2, 3, 8, 8)
    assert type(model[1]) is PackedMaxPool2d and isinstance(model[1], nn.MaxPool2d)
    want = model(x)
    quantize.save(model, tmp_path / "file")
    loaded = quantize.load(network(2), tmp_path / "file")
    again = quantize.load(loaded, tmp_path / "file")
    for made in (loaded, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made[1]) is PackedMaxPool2d
        assert torch.equal(made(x), want)
    assert str(quantize.summary(model, x)) == str(quantize.summary(plain(model), x))


def test_compressed_pools_become_them():
    trained = QModule(quantize.prepare(network(2), Uniform(8)))
    trained(torch.randn(2, 3, 8, 8)).sum().backward()
    model = quantize.convert(trained)
    assert PackedMaxPool2d in {type(m) for m in model.modules()}


def test_gradients_pass_through():
    model = packed(2)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(slope, torch.autograd.grad(plain(model)(x).sum(), x)[0]) and slope.abs().max() > 0


def test_transforms_and_traces():
    model, x = packed(2), torch.randn(2, 3, 8, 8)
    want = model(x)
    assert torch.equal(torch.jit.trace(model, x)(x), want)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), want)
    assert torch.equal(torch.compile(model, backend="eager")(x), want)
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]).squeeze(1), want)


def test_what_is_not_a_plain_pool_stays():
    class Counting(nn.MaxPool2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Counting(2), nn.MaxPool2d(2, return_indices=True))
    model = quantize.convert(quantize.prepare(model, Uniform(8)))
    assert type(model[1]) is Counting
    x = torch.randn(1, 3, 12, 12)
    for got, want in zip(model(x), plain(model)(x), strict=True):
        assert torch.equal(got, want)


def test_bad_input_is_pytorchs_error():
    model = packed(4)
    for x in (torch.randn(1, 3, 2, 2), torch.randn(1, 3, 3, 8)):
        with pytest.raises(RuntimeError) as expected:
            plain(model)(x)
        with pytest.raises(RuntimeError) as got:
            model(x)
        assert str(got.value).split("\n")[0] == str(expected.value).split("\n")[0]
