"""First convolutions of converted models that stay float: the plain ones' outputs, but for rounding."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from same_bits import on_every_isa
from torch import nn

import quantize
from quantize import Uniform
from quantize.packed.stems import PackedStemConv2d, is_stem, stem_panels

op = torch.ops.quantize.stem_conv2d
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# outputs, channels, kernel, stride, padding, image, batch
SHAPES = [
    (64, 3, (7, 7), (2, 2), (3, 3), (64, 64), 2),
    (17, 1, (7, 7), (2, 2), (3, 3), (30, 31), 2),
    (40, 4, (5, 5), (2, 2), (2, 2), (17, 23), 3),
    (33, 2, (6, 6), (2, 2), (0, 0), (20, 64), 2),
    (16, 3, (8, 5), (2, 2), (4, 4), (9, 9), 1),
    (5, 3, (7, 7), (2, 2), (3, 3), (7, 1), 1),
    (5, 3, (7, 7), (2, 2), (3, 3), (1, 7), 1),
    (96, 3, (5, 8), (2, 2), (9, 1), (50, 230), 1),
    (3, 3, (6, 7), (2, 2), (0, 7), (20, 12), 2),
]


def random_stem(outputs, channels, kernel, image, batch):
    torch.manual_seed(outputs)
    return torch.randn(batch, channels, *image), torch.randn(outputs, channels, *kernel), torch.randn(outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("outputs", "channels", "kernel", "stride", "padding", "image", "batch"), SHAPES)
def test_outputs_are_the_convolutions(outputs, channels, kernel, stride, padding, image, batch, layout):
    x, weight, bias = random_stem(outputs, channels, kernel, image, batch)
    x, panels = x.to(memory_format=layout), stem_panels(weight)
    want = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)

    def run():
        out = op(x, weight, bias, panels, stride, padding)
        bare = op(x, weight, None, panels, stride, padding)
        return torch.stack([out.contiguous(), bare.contiguous()])

    # Errors are the terms', not the sums': some 30 units in the last place of the sum of their absolute values at the most.
    bound = float(2e-6 * F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), stride, padding).max())
    by_isa = on_every_isa(run)
    for out in by_isa.values():
        torch.testing.assert_close(out[0].double(), want, rtol=0, atol=bound)
        torch.testing.assert_close(out[1].double(), want - bias.double().view(-1, 1, 1), rtol=0, atol=bound)
    filtered = [out for isa, out in by_isa.items() if isa != "portable"]  # which has no multiply-add, and PyTorch's own convolution
    assert all(torch.equal(out, filtered[0]) for out in filtered)
    assert op(x, weight, None, panels, stride, padding).stride() == F.conv2d(x, weight, None, stride, padding).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [24, 32])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(threads, outputs, layout):
    x, weight, bias = random_stem(outputs, 3, (7, 7), (90, 88), 3)
    x = x.to(memory_format=layout)
    arguments = (x, weight, bias, stem_panels(weight), [2, 2], [3, 3])
    before, want = torch.get_num_threads(), op(*arguments)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(op(*arguments), want)
    finally:
        torch.set_num_threads(before)


def test_rounding_stays_near_the_plain_sums():
    x, weight, _ = random_stem(64, 3, (7, 7), (112, 112), 1)
    want = F.conv2d(x.double(), weight.double(), None, 2, 3)
    error = op(x, weight, None, stem_panels(weight), [2, 2], [3, 3]) - want
    assert float(error.std() / want.std()) < 1.5e-6  # 1.2e-6; plain sums in float32 have 2.2e-7


def network(**options):
    return nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, **options), nn.ReLU(), nn.Conv2d(16, 4, 1))


def packed(**options):
    return quantize.convert(quantize.prepare(network(**options), {"*": Uniform(8), "0": None}))


@torch.no_grad()
def test_converted_models_have_them(tmp_path):
    model, x = packed(), torch.randn(2, 3, 20, 20)
    assert type(model[0]) is PackedStemConv2d and isinstance(model[0], nn.Conv2d)
    want = model(x)
    torch.testing.assert_close(want, model[2](F.relu(F.conv2d(x, model[0].weight, model[0].bias, 2, 3))))
    quantize.save(model, tmp_path / "file")
    loaded = quantize.load(network(), tmp_path / "file")
    again = quantize.load(loaded, tmp_path / "file")
    for made in (loaded, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made[0]) is PackedStemConv2d and torch.equal(made(x), want)
    assert list(model.state_dict()) == list(packed().state_dict())
    assert quantize.summary(model, x).macs == quantize.summary(network(), x).macs


@torch.no_grad()
def test_changed_weights_are_seen():
    model, x = packed(), torch.randn(2, 3, 20, 20)
    before = model(x)
    model[0].weight.mul_(2)
    model[0].bias.mul_(2)
    torch.testing.assert_close(model[0](x), F.conv2d(x, model[0].weight, model[0].bias, 2, 3))
    assert not torch.equal(model(x), before)
    model[0].weight = nn.Parameter(torch.rand_like(model[0].weight) / 10)
    torch.testing.assert_close(model[0](x), F.conv2d(x, model[0].weight, model[0].bias, 2, 3))


def test_everything_else_is_plain():
    model, x = packed(), torch.randn(2, 3, 20, 20)
    stem, weight, bias = model[0], model[0].weight, model[0].bias
    (slope,) = torch.autograd.grad(stem(x).sum(), weight)  # whose gradient is asked for
    assert torch.equal(slope, torch.autograd.grad(F.conv2d(x, weight, bias, 2, 3).sum(), weight)[0])
    with torch.no_grad():
        for own in (x[0], x[:0]):
            assert torch.equal(stem(own), F.conv2d(own, weight, bias, 2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            assert stem(x).dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(stem).double()(x.double()), F.conv2d(x.double(), weight.double(), bias.double(), 2, 3))
        meta = op(x.to("meta"), weight.to("meta"), None, stem_panels(weight).to("meta"), [2, 2], [3, 3])
        assert meta.shape == (2, 16, 10, 10)
        with pytest.raises(ValueError, match="PackedStemConv2d .0.: input must be .N, 3, H, W."):
            stem(x[:, :2])


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1},
        {"stride": (1, 2)},
        {"kernel_size": (3, 7)},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 3},
        {"kernel_size": 9},
        {"groups": 3},
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(options):
    made = nn.Conv2d(**({"in_channels": 3, "out_channels": 6, "kernel_size": 7, "stride": 2, "padding": 3} | options))
    assert is_stem(nn.Conv2d(3, 6, 7, 2, 3)) and not is_stem(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(2, 3, 9, 9).long()}, "x must be Float"),
        ({0: torch.ones(2, 2, 9, 9)}, "x must be .N, 3, H, W."),
        ({1: torch.ones(8, 3, 7, 9)}, "weight must be .N, 1 to 4, 5 to 8, 5 to 8."),
        ({1: torch.ones(8, 3, 4, 7)}, "weight must be .N, 1 to 4, 5 to 8, 5 to 8."),
        ({2: torch.ones(7)}, "bias must be .8."),
        ({3: torch.ones(1, 3, 16)}, "panels must be contiguous"),
        ({4: [2, 1]}, "stride must be .2, 2.; got .2, 1."),
        ({4: [1, 2]}, "stride must be .2, 2.; got .1, 2."),
        ({5: [3]}, "kernel, stride, padding and dilation must be pairs"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, message):
    weight = torch.randn(8, 3, 7, 7)
    arguments = [torch.ones(2, 3, 9, 9), weight, None, stem_panels(weight), [2, 2], [3, 3]]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises((TypeError, ValueError), match=f"stem_conv2d: {message}"):
        op(*arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_tiles_and_no_more(each_isa, value):
    """Tiles of 4 x 4 outputs of which one sees the pixel; what plain gives NaN or infinity for is not finite here either."""
    x, weight, bias = random_stem(16, 3, (7, 7), (40, 64), 2)
    x[1, 2, 20, 30] = value
    found, plain = op(x, weight, bias, stem_panels(weight), (2, 2), (3, 3)), F.conv2d(x, weight, bias, 2, 3)
    sees = ~plain.isfinite()
    tiles = F.max_pool2d(sees.float(), 4).repeat_interleave(4, -1).repeat_interleave(4, -2).bool()
    assert sees.any() and not found[sees].isfinite().any()
    torch.testing.assert_close(found[~tiles], plain[~tiles], rtol=1e-4, atol=1e-4)
