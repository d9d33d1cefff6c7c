"""What converted models, convert and load refuse: named by layer, before anything has changed."""

import pytest
import torch
from torch import nn

import quantize
from quantize import Uniform


@pytest.mark.parametrize("tail", [(), (nn.ReLU(),)], ids=["codes", "clip"])
def test_an_output_that_waits_blames_its_own_layer(tail):
    layers = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 5), nn.ReLU(), nn.Conv2d(16, 16, 5), *tail]
    model = quantize.prepare(nn.Sequential(*layers), Uniform(8, activation_bits=8))
    model(torch.randn(2, 16, 20, 20))
    packed = quantize.convert(model)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            for size, layer, at in ((3, "2", 3), (7, "4", 3)):
                for _ in range(2):
                    with pytest.raises(
                        ValueError, match=rf"^PackedConv2d '{layer}': input must be at least 5 x 5 .*; got \[2, 16, {at}, {at}\]"
                    ):
                        packed(torch.randn(2, 16, size, size).contiguous(memory_format=layout))
        with pytest.raises(ValueError, match=r"^PackedConv2d '0': input must be \[N, 16, H, W\] or \[16, H, W\]; got \[2, 3, 9, 9\]"):
            packed(torch.randn(2, 3, 9, 9))
        packed(torch.randn(2, 16, 20, 20))


def test_bits_on_their_way_are_counted_as_channels():
    layers = []
    for _ in range(3):
        layers += [nn.BatchNorm2d(16), nn.Hardtanh(), nn.Conv2d(16, 16, 5)]
    packed = quantize.convert(quantize.prepare(nn.Sequential(*layers).eval(), quantize.XNOR()))
    assert packed[2]._next is packed[5]
    with torch.no_grad(), pytest.raises(ValueError, match=r"^PackedConv2d '5': input must be at least 5 x 5 .*; got \[1, 16, 2, 2\]"):
        packed(torch.randn(1, 16, 6, 6))


def test_a_step_that_diverged_is_not_packed():
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 4)), Uniform(8, activation_bits=8))
    model(torch.randn(2, 16))
    model[0].activation_quantizer.step.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="^convert: the activation quantizer of layer '0' must be finite; got nan"):
        quantize.convert(model)


def test_learned_bits_that_are_nan_count_as_the_most():
    """A bound that is NaN says nothing; bits that are do, as in training."""
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 4)), quantize.DiffQ(activation_bits="learned"))
    model(torch.randn(4, 16))
    own = model[0].activation_quantizer
    own.logits.data.fill_(torch.nan)
    packed = quantize.convert(model)
    assert packed[0].activation_bits == 8 and packed(torch.randn(2, 16)).isfinite().all()
    own.bound.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="^convert: the activation quantizer of layer '0' must be finite; got nan"):
        quantize.convert(model)


@pytest.mark.parametrize("function", ["convert", "size_report"])
def test_models_without_values(function):
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 4)), Uniform(4)).to("meta")
    with pytest.raises(ValueError, match=f"^{function}: model must have its values in memory; '0.weight' is on the meta device"):
        getattr(quantize, function)(model)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def test_load_changes_nothing_where_a_name_is_taken(tmp_path):
    quantize.save(quantize.convert(quantize.prepare(network(), Uniform(4))), tmp_path / "file")
    model = network()
    model[2].scales = 3
    with pytest.raises(ValueError, match="layer '2': expected no attribute 'scales' of its own, which packed layers have; rename it"):
        quantize.load(model, tmp_path / "file")
    assert type(model[0]) is nn.Conv2d and model[2].scales == 3


def test_layers_of_a_compressed_model_keep_their_names(tmp_path):
    quantize.save(quantize.convert(quantize.prepare(network(), Uniform(4))), tmp_path / "file")
    loaded = quantize.load(quantize.QModule(network()), tmp_path / "file")
    assert [loaded[0].placed, loaded[2].placed] == ["0", "2"]
    with pytest.raises(ValueError, match="^PackedConv2d '0': input must be"):
        loaded(torch.randn(2, 4, 9, 9))


def test_groups_larger_than_a_layer_take_no_memory():
    model = nn.Sequential(nn.Linear(4, 4))
    packed = quantize.convert(quantize.prepare(model, quantize.DiffQ(group_size=2**48)))
    assert packed(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(ValueError, match="^DiffQ: group_size must be an integer of at least 0, and at most 2.48"):
        quantize.DiffQ(group_size=2**48 + 1)
