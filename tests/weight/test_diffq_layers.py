"""Learned bits in layers of every kind, their configuration, and what a forward pass does with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffq_models import COARSE, Attention, Cell, First, Net, Tied, at_rest, gradients, images, logits_of, quantizers
from torch import nn

from quantize import DiffQ, Uniform, add_bit_parameters, prepare, size_penalty, weight_bits

LAYERS = {
    "linear": (lambda: nn.Linear(9, 4), lambda: torch.randn(3, 9)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, bias=False), lambda: torch.randn(2, 3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3), lambda: torch.randn(2, 3, 4, 4, 4)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), lambda: torch.randn(2, 6, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: torch.randn(2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), lambda: torch.randn(2, 6, 4, 4)),
    "transposed, groups": (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), lambda: torch.randn(2, 6, 4)),
    "LSTM": (lambda: First(nn.LSTM(5, 4, num_layers=2, bidirectional=True)), lambda: torch.randn(6, 2, 5)),
    "LSTM with projections": (lambda: First(nn.LSTM(5, 4, proj_size=3)), lambda: torch.randn(6, 2, 5)),
    "GRU": (lambda: First(nn.GRU(5, 4, bias=False)), lambda: torch.randn(6, 2, 5)),
    "RNN": (lambda: First(nn.RNN(5, 4)), lambda: torch.randn(6, 2, 5)),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), lambda: torch.randn(6, 2, 5)),
    "GRUCell": (lambda: Cell(nn.GRUCell), lambda: torch.randn(6, 2, 5)),
    "attention": (Attention, lambda: torch.randn(2, 5, 8)),
    "attention of three": (lambda: Attention(kdim=8, vdim=8, bias=False), lambda: torch.randn(2, 5, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_kinds_of_layers(name):
    make, data = LAYERS[name]
    plain, x = make(), data()
    model = prepare(copy.deepcopy(plain), COARSE)
    names = {name for name, p in plain.named_parameters() if p.dim() > 1}
    assert weight_bits(model).keys() == names
    assert {id(p) for p in model.parameters()} >= {id(q.logits) for q in quantizers(model)}
    # Fresh noise each time; the output is that of weights which have moved by less than half a step.
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    assert at_rest(model)
    first.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert all(own.grad.any() for own in logits_of(model))
    model.eval()
    y = model(x)
    assert torch.equal(y, model(x))
    # Evaluation is the plain layer's with weights on their grid.
    with torch.no_grad():
        for parameter_name in names:
            module, _, tensor = parameter_name.rpartition(".")
            getattr(plain.get_submodule(module), tensor).copy_(getattr(model.get_submodule(module), tensor))
    torch.testing.assert_close(y, plain.eval()(x))


def test_transposed_ranges_are_those_of_output_channels():
    layer = nn.ConvTranspose2d(6, 4, 3)
    layer.weight.data[:, 1] *= 100
    model = prepare(layer, DiffQ(group_size=0, init_bits=8)).eval()
    error = (model.weight - model.parametrizations.weight.original).abs().amax((0, 2, 3))
    assert error[1] > 10 * error[[0, 2, 3]].max()


def test_noise_lies_within_a_step():
    model = prepare(nn.Linear(64, 16), DiffQ(init_bits=4))
    latent = model.parametrizations.weight.original
    step = (latent.amax(1) - latent.amin(1)) / 15
    drawn = torch.stack([model.weight for _ in range(200)])  # outside of a forward pass
    noise = ((drawn - latent) / step[:, None]).detach()
    assert float(noise.abs().max()) <= 0.5001
    assert float(noise.std()) == pytest.approx(12**-0.5, rel=0.01)
    assert float(noise.mean(0).abs().max()) < 5.5 * (12 * 200) ** -0.5


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("span", ["channel", "tensor", "group"])
@pytest.mark.parametrize("group_size", [1, 8, 17, 0])
def test_configurations(group_size, span, noise):
    model = prepare(nn.Linear(19, 7), DiffQ(group_size, 2, 8, 4, span, noise))
    assert logits_of(model)[0].numel() == -(-133 // (group_size or 133))
    gradients(model, torch.randn(5, 19))
    assert model.parametrizations.weight.original.grad.isfinite().all()
    model.eval()
    assert torch.equal(model(x := torch.randn(5, 19)), model(x))


def test_first_bits():
    for init in (2, 3, 8, 14.5, 15):
        model = prepare(nn.Linear(8, 4), DiffQ(init_bits=init))
        found = weight_bits(model)["weight"]
        assert found.shape == (4,)
        torch.testing.assert_close(found, torch.full((4,), float(init)), rtol=0, atol=13 / 64 + 1e-4)  # a little off the bounds
        assert weight_bits(model.eval())["weight"].unique().item() == round(init) if init != 14.5 else True
    fixed = prepare(nn.Linear(8, 4), DiffQ(min_bits=5, max_bits=5, init_bits=5))
    assert weight_bits(fixed)["weight"].tolist() == [5.0] * 4


def test_bits_in_training_and_in_evaluation():
    model = prepare(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), {"0": DiffQ(), "1": Uniform(4)})
    with torch.no_grad():
        quantizers(model)[0].logits.copy_(torch.linspace(-2, 2, 4))
    bits = weight_bits(model)
    torch.testing.assert_close(bits["0.weight"], 2 + 13 * torch.linspace(-2, 2, 4).sigmoid())
    assert bits["1.weight"] == 4
    assert torch.equal(weight_bits(model.eval())["0.weight"], (2 + 13 * torch.linspace(-2, 2, 4).sigmoid()).round())


def test_patterns_and_activations():
    model = prepare(Net(), {"*": DiffQ(activation_bits=8), "conv": None, "fc": DiffQ(group_size=0, activation_bits=None)})
    assert weight_bits(model).keys() == {"depthwise.weight", "up.weight", "one.weight", "fc.weight"}
    assert weight_bits(model)["fc.weight"].shape == (1,)
    assert hasattr(model.one, "activation_quantizer")
    assert not hasattr(model.fc, "activation_quantizer")
    gradients(model, images())
    assert model.one.activation_quantizer.step.grad is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 8.0}, TypeError, "DiffQ: group_size must be an integer of at least 0, and at most 2.48; got 8.0"),
        ({"group_size": True}, TypeError, "group_size must be an integer of at least 0, and at most 2.48; got True"),
        ({"group_size": -1}, ValueError, "group_size must be an integer of at least 0, and at most 2.48; got -1"),
        ({"min_bits": "2"}, TypeError, "DiffQ: min_bits must be a number from 1 to 16; got '2'"),
        ({"min_bits": 0.5}, ValueError, "min_bits must be a number from 1 to 16; got 0.5"),
        ({"max_bits": 17}, ValueError, "max_bits must be a number from 1 to 16; got 17"),
        ({"max_bits": None}, TypeError, "max_bits must be a number from 1 to 16; got None"),
        ({"init_bits": float("nan")}, ValueError, "init_bits must be a number from 1 to 16; got nan"),
        ({"init_bits": False}, TypeError, "init_bits must be a number from 1 to 16; got False"),
        ({"min_bits": 9, "max_bits": 8}, ValueError, "min_bits must be at most max_bits, 8; got 9"),
        ({"max_bits": 6}, ValueError, "init_bits must be from min_bits to max_bits, 2 to 6; got 8"),
        ({"min_bits": 3.2, "max_bits": 3.8, "init_bits": 3.5}, ValueError, "must hold a whole number; got 3.2 to 3.8"),
        ({"range": "row"}, ValueError, "DiffQ: range must be one of 'channel', 'tensor', 'group'; got 'row'"),
        ({"noise": None}, ValueError, "DiffQ: noise must be one of 'uniform', 'gaussian'; got None"),
        ({"activation_bits": 9}, ValueError, "DiffQ: activation_bits must be an integer from 2 to 8; got 9"),
    ],
)
def test_errors_of_the_configuration(options, error, message):
    with pytest.raises(error, match=message):
        DiffQ(**options)


def test_float64_is_refused():
    model = Net()
    model.fc.double()
    with pytest.raises(TypeError, match="weight of layer 'fc' must be float32, float16 or bfloat16; got torch.float64"):
        prepare(model, DiffQ())
    assert not quantizers(model)
    later = prepare(nn.Linear(4, 3), DiffQ()).double()
    for training in (True, False):
        with pytest.raises(TypeError, match="must be float32, float16 or bfloat16; got Double"):
            later.train(training)(torch.randn(2, 4, dtype=torch.float64))
    assert at_rest(later)
    assert later.float().train()(torch.randn(2, 4)).isfinite().all()


def test_one_weight_for_a_whole_forward_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.a(x) - F.linear(x, self.a.weight)

    model = prepare(Twice(), COARSE)
    y = model(torch.randn(3, 6))
    assert not y.any()
    assert not torch.equal(model.a.weight, model.a.weight)  # outside of one, each use has its own


def test_layers_have_noise_of_their_own():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].load_state_dict(model[0].state_dict())
    prepare(model, COARSE)
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.detach()))
    model(torch.randn(3, 6))
    assert not torch.equal(*seen)


def test_many_weights_are_made_in_buckets(monkeypatch):
    monkeypatch.setattr("quantize.weight.diffq.BUCKET", 50)
    model = prepare(Net(), COARSE)
    x = images()
    y, grads = gradients(model, x)
    assert all(g.isfinite().all() for g in grads.values())
    assert at_rest(model)
    assert not torch.equal(model(x), y)


def test_a_seed_makes_training_repeatable():
    def trained():
        torch.manual_seed(3)
        model, x = prepare(Net(), DiffQ(init_bits=4)), images(8)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        add_bit_parameters(optimizer, model, lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            (model(x).square().mean() + size_penalty(model)).backward()
            optimizer.step()
        return model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_tied_weights_share_their_bits():
    model = prepare(Tied(), COARSE)
    assert model.b.parametrizations.weight[0] is model.a.parametrizations.weight[0]
    assert model.b.parametrizations.weight.original is model.a.parametrizations.weight.original
    assert len(logits_of(model)) == 1
    assert len([name for name, _ in model.named_parameters() if name.endswith("logits")]) == 1
    seen = []
    for layer in (model.a, model.b):
        layer.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.detach()))
    model(torch.randn(3, 6)).sum().backward()
    assert all(torch.equal(seen[0], other) for other in seen[1:])  # the same noise
    model.eval()
    assert torch.equal(model.a.weight, model.b.weight)
    twin = copy.deepcopy(model)
    assert twin.b.parametrizations.weight[0] is twin.a.parametrizations.weight[0]


def test_weights_that_are_tied_across_axes_are_not_shared():
    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 4, 3)
            self.up.weight = self.down.weight

        def forward(self, x):
            return self.up(self.down(x))

    model = prepare(Across(), COARSE)
    assert len(quantizers(model)) == 2
    gradients(model, torch.randn(2, 4, 9))
