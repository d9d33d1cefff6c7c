"""prepare() works in place and leaves the model what it was: a test per clause of its docstring. With others: test_prepare_together.py."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from quantize import DiffQ, PowerOfTwo, Uniform, prepare, weight_bits
from quantize.weight.prepare import prepared_weights

ops = torch.ops.quantize


class Net(nn.Module):
    """Convolutions of two kinds, a norm, a linear layer, and things that are left alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2))
        self.fc = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.fc(self.body(self.conv(x)).mean((2, 3))) * self.scale


def images(n=4):
    return torch.randn(n, 3, 8, 8)


def fake(weight, config, axis=0):
    rows = weight.detach().movedim(axis, 0)
    return ops.fake_quantize(rows, config.codebook, config.weight_bits, config.scale == "least_squares").movedim(0, axis)


CONFIGS = [Uniform(8), Uniform(2), Uniform(4, scale="max"), PowerOfTwo(4), PowerOfTwo(3, plus=False), PowerOfTwo(4, scale="max")]


def test_in_place_and_the_same_parameters():
    model = Net()
    model.conv.requires_grad_(False)
    model.body.eval()
    before = {id(p): p.detach().clone() for p in model.parameters()}
    buffers = [id(b) for b in model.buffers()]
    assert prepare(model, Uniform(4)) is model
    assert {id(p) for p in model.parameters()} == set(before)
    assert all(torch.equal(p, before[id(p)]) for p in model.parameters())
    assert [id(b) for b in model.buffers()] == buffers
    assert not model.conv.parametrizations.weight.original.requires_grad
    assert [m.training for m in (model, model.body, model.body[2], model.fc)] == [True, False, False, True]
    assert isinstance(model.conv, nn.Conv2d)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_weight_is_on_its_grid_and_the_forward_uses_it(config):
    plain = Net()
    model = prepare(copy.deepcopy(plain), config)
    with torch.no_grad():
        plain.conv.weight.copy_(fake(plain.conv.weight, config))
        plain.body[2].weight.copy_(fake(plain.body[2].weight, config, axis=1))  # out channels of a transposed convolution: dimension 1
        plain.fc.weight.copy_(fake(plain.fc.weight, config))
    for ours, theirs in ((model.conv, plain.conv), (model.body[2], plain.body[2]), (model.fc, plain.fc)):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    x = images()
    assert torch.equal(model(x), plain(x))
    assert model.fc.weight[0].unique().numel() <= 2**config.weight_bits - 1
    for weight in prepared_weights(model):
        levels, scales = weight.quantizer.encode(weight.latent)
        own = getattr(weight.module, weight.tensor).movedim(weight.quantizer.axis, 0)
        assert torch.equal(levels * scales.view(-1, *[1] * (own.dim() - 1)), own)


def test_the_gradient_goes_to_the_latent_weight():
    plain, config = Net(), Uniform(4)
    model = prepare(copy.deepcopy(plain), config)
    with torch.no_grad():
        plain.fc.weight.copy_(fake(latent := plain.fc.weight.clone(), config))
    x = torch.randn(9, 6)
    for fc in (model.fc, plain.fc):
        fc(x).square().sum().backward()
    limit = ops.channel_quantize(latent, "uniform", 4, True)[2]
    want = torch.where(latent.abs() <= limit[:, None], plain.fc.weight.grad, 0)
    assert torch.equal(model.fc.parametrizations.weight.original.grad, want)


def test_an_optimizer_made_before_keeps_working():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).sum().backward()
    optimizer.step()
    prepare(model, PowerOfTwo(4))
    before = model.conv.parametrizations.weight.original.detach().clone()
    optimizer.zero_grad()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.conv.parametrizations.weight.original, before)
    assert (model.conv.parametrizations.weight.original - before).abs().max() < 1


def test_patterns():
    assert weight_bits(prepare(Net(), {"*": Uniform(4), "conv": None})) == {"body.2.weight": 4, "fc.weight": 4}
    bits = weight_bits(prepare(Net(), {"*": Uniform(4), "body.*": PowerOfTwo(3), "fc": Uniform(8), "f?": Uniform(2)}))  # the last match
    assert bits == {"conv.weight": 4, "body.2.weight": 3, "fc.weight": 2}
    assert all(isinstance(b, torch.Tensor) and b.dim() == 0 for b in bits.values())
    assert weight_bits(prepare(Net(), {"[cf]*": Uniform(5)})) == {"conv.weight": 5, "fc.weight": 5}
    assert weight_bits(prepare(nn.Linear(3, 2), Uniform(7))) == {"weight": 7}
    assert weight_bits(prepare(nn.Linear(3, 2), {"": Uniform(7)})) == {"weight": 7}
    assert weight_bits(Net()) == {}
    with pytest.raises(TypeError, match="weight_bits: model must be an nn.Module; got int"):
        weight_bits(3)


def test_a_pattern_that_fits_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="pattern 'classifier' matches no module"):
        prepare(Net(), {"*": Uniform(4), "classifier": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(Net(), {"*": Uniform(4), "body.1": None})  # a module, if none with a weight


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyLinear(3)


def broken(change):
    model = Net()
    change(model)
    return model


def poison(model):
    model.fc.weight.data[0, 1] = torch.nan
    model.fc.weight.data[1, 1] = torch.inf


def pruned(model):
    prune.l1_unstructured(model.fc, "weight", 0.5)


KINDS = "a Uniform, a PowerOfTwo, a DiffQ, a Ternary, an XNOR or a DoReFa"


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (3, Uniform(4), TypeError, "prepare: model must be an nn.Module; got int"),
        (nn.Linear, Uniform(4), TypeError, "prepare: model must be an nn.Module; got type"),
        (
            Net(),
            4,
            TypeError,
            f"prepare: config must be {KINDS} or a mapping from glob patterns to it; got 4",
        ),
        (Net(), None, TypeError, "prepare: config must be"),
        (
            Net(),
            {"fc": 4},
            TypeError,
            f"prepare: config must be {KINDS} for 'fc'; got 4",
        ),
        (Net(), {3: Uniform(4)}, TypeError, "config's keys must be glob patterns over module names; got 3"),
        (Net(), {}, ValueError, "its convolution and linear layers are 'conv', 'body.2', 'fc'"),
        (Net(), {"*": None}, ValueError, "model must have a layer that config chooses"),
        (nn.ReLU(), Uniform(4), ValueError, "its convolution and linear layers are none"),
        (broken(lambda m: prepare(m.fc, Uniform(8))), Uniform(4), ValueError, "weight of layer 'fc' must not be prepared already"),
        (broken(lambda m: m.fc.double()), Uniform(4), TypeError, "weight of layer 'fc' must be float32.*; got torch.float64"),
        (broken(lambda m: setattr(m.fc, "weight", nn.Parameter(torch.ones(5, 6).int(), False))), Uniform(4), TypeError, "got torch.int32"),
        (broken(poison), Uniform(4), ValueError, "weight of layer 'fc' must be finite; got 2 values"),
        (Lazy(), Uniform(4), ValueError, "weight of layer 'lazy' must be initialized"),
        (
            broken(pruned),
            Uniform(4),
            ValueError,
            r"weight of layer 'fc' must be a parameter; got Tensor \(remove weight_norm or pruning first\)",
        ),
        (broken(lambda m: setattr(m.fc, "weight", None)), DiffQ(), ValueError, "weight of layer 'fc' must be a parameter; got NoneType"),
    ],
)
def test_errors_leave_the_model_as_it_was(model, config, error, message):
    def state():
        modules = model.modules() if isinstance(model, nn.Module) else ()
        return [(id(m), parametrize.is_parametrized(m), len(m._forward_pre_hooks)) for m in modules]

    before = state()
    with pytest.raises(error, match=message):
        prepare(model, config)
    assert state() == before


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_are_named():
    with pytest.raises(ValueError, match=r"weight of layer '1' must not be empty; got shape \[4, 0\]"):
        prepare(nn.Sequential(nn.Linear(3, 3), nn.Linear(0, 4)), Uniform(4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Uniform(1), ValueError, "Uniform: weight_bits must be an integer from 2 to 8; got 1"),
        (lambda: Uniform(9), ValueError, "got 9"),
        (lambda: Uniform(4.0), TypeError, "got 4.0"),
        (lambda: Uniform(True), TypeError, "got True"),
        (lambda: Uniform(4, activation_bits=1), ValueError, "Uniform: activation_bits must be an integer from 2 to 8; got 1"),
        (lambda: Uniform(4, scale="mean"), ValueError, "scale must be one of 'least_squares', 'max', 'learned'; got 'mean'"),
        (lambda: PowerOfTwo(0), ValueError, "PowerOfTwo: bits must be an integer from 2 to 8; got 0"),
        (lambda: PowerOfTwo("4"), TypeError, "got '4'"),
        (lambda: PowerOfTwo(4, plus=None), TypeError, "PowerOfTwo: plus must be a bool; got None"),
        (lambda: PowerOfTwo(4, activation_bits=2.5), TypeError, "PowerOfTwo: activation_bits must be an integer from 2 to 8; got 2.5"),
    ],
)
def test_errors_of_configurations(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_configurations_are_values():
    assert Uniform(4) == Uniform(4) != Uniform(5)
    assert hash(PowerOfTwo(4)) == hash(PowerOfTwo(4, True))
    assert (PowerOfTwo().weight_bits, Uniform().weight_bits) == (4, 8)
    with pytest.raises(AttributeError):
        Uniform(4).weight_bits = 3


# ------------------------------------------------------------------------------------------------------------- kinds of layers


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x):
            return self.again(self.b(self.a(x)))

    model = prepare(Tied(), Uniform(4))
    latent = model.a.parametrizations.weight.original
    assert model.b.parametrizations.weight.original is latent
    assert len([p for p in model.parameters() if p.dim() == 2]) == 1
    assert torch.equal(model.a.weight, model.b.weight)
    model(torch.randn(3, 6)).sum().backward()
    assert latent.grad is not None
    assert weight_bits(model) == {"a.weight": 4, "b.weight": 4, "again.weight": 4}


@pytest.mark.parametrize(("cls", "dims"), [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose3d, 3)])
def test_other_convolutions(cls, dims):
    model = prepare(cls(4, 6, 3), PowerOfTwo(4, activation_bits=8))
    x = torch.randn(2, 4, *[7] * dims)
    y = model(x)
    axis = 1 if "Transpose" in cls.__name__ else 0
    assert torch.equal(model.weight, fake(model.parametrizations.weight.original, PowerOfTwo(4), axis))
    y.sum().backward()
    assert model.parametrizations.weight.original.grad.abs().sum() > 0
    assert model.activation_quantizer.step.grad is not None


def test_attention():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    plain = copy.deepcopy(model)
    prepare(model, Uniform(4, activation_bits=4))
    assert weight_bits(model) == {"in_proj_weight": 4, "out_proj.weight": 4}
    with torch.no_grad():
        plain.in_proj_weight.copy_(fake(plain.in_proj_weight, Uniform(4)))
        plain.out_proj.weight.copy_(fake(plain.out_proj.weight, Uniform(4)))
    x = torch.randn(3, 5, 8)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x, x, x)[0], plain.train(mode)(x, x, x)[0])
        with torch.no_grad():
            torch.testing.assert_close(model(x, x, x)[0], plain(x, x, x)[0])
    model(x, x, x)[0].sum().backward()
    assert model.parametrizations.in_proj_weight.original.grad is not None


def test_a_transformer_layer_quantizes_its_inputs_in_evaluation_too():
    model = prepare(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), Uniform(4, activation_bits=3))
    x = torch.randn(3, 5, 8)
    trained = model(x)
    with torch.no_grad():  # where PyTorch has a kernel that calls no layers
        torch.testing.assert_close(model.eval()(x), trained)


def test_recurrent_layers_are_prepared_and_embeddings_are_not():
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "norm": nn.LayerNorm(4), "embedding": nn.Embedding(3, 4), "fc": nn.Linear(4, 2)})
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"]
    assert weight_bits(prepare(model, Uniform(4))) == dict.fromkeys(names, 4)
    assert model.lstm(torch.randn(3, 2, 4))[0].shape == (3, 2, 4)


def test_inputs_by_keyword():
    model = prepare(nn.Linear(6, 3), Uniform(8, activation_bits=3))
    x = torch.randn(50, 6)
    assert torch.equal(model(input=x), model(x))
    assert torch.equal(model(x), F.linear(model.activation_quantizer(x), model.weight, model.bias))
    assert model.activation_quantizer(x).unique().numel() <= 8


def test_activation_bits_over_another_parametrization():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    prepared = prepare(nn.Sequential(layer), Uniform(4, activation_bits=8))
    prepared(torch.randn(2, 8)).sum().backward()
    assert prepared[0].activation_quantizer.initialized
