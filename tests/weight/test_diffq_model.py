"""Models with learned bits: prepare, training, the optimizer's guard and the size penalty."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffq_processes import WORLD
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantize
from quantize import ActivationConfig, DiffQ, QModule, Uniform, add_bit_parameters, prepare, size_penalty, size_report, weight_bits
from quantize.weight.diffq import begin_forward, diffq_quantizers

ops = torch.ops.quantize
MIB = 1 << 20
COARSE = DiffQ(group_size=4, init_bits=3)  # noise that shows


class Net(nn.Module):
    """Convolutions of four kinds, a norm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.one = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = self.depthwise(self.norm(self.conv(x)).relu())
        return self.fc(self.one(self.up(x)).relu().mean((2, 3)))


def images(n=4):
    return torch.randn(n, 3, 6, 6)


def quantizers(model):
    return list(diffq_quantizers(model))


def logits_of(model):
    return [q.logits for q in quantizers(model)]


def at_rest(model):
    """Nothing of a forward pass is left behind."""
    return all(q.ready is None and q.beginner is None for q in quantizers(model))


def gradients(model, x, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


# ------------------------------------------------------------------------------------------------------------- layers


class Cell(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.cell = cls(5, 4)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class First(nn.Module):
    """The first of what a recurrent layer returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


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
        ({"group_size": 8.0}, TypeError, "DiffQ: group_size must be an integer of at least 0; got 8.0"),
        ({"group_size": True}, TypeError, "group_size must be an integer of at least 0; got True"),
        ({"group_size": -1}, ValueError, "group_size must be an integer of at least 0; got -1"),
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


# ------------------------------------------------------------------------------------------------------------- forward passes


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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x):
        return self.again(self.b(self.a(x)))


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


# ------------------------------------------------------------------------------------------------------------- checkpointing


class Watched(nn.Linear):
    """Remembers the weights that it computed with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def forward(self, x):
        weight = self.weight
        self.seen.append(weight.detach().clone())
        return F.linear(x, weight, self.bias)


class Blocks(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(Watched(8, 8), nn.ReLU(), nn.Dropout(0.3), Watched(8, 8)) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        return self.last(x)

    def watched(self):
        return [m for m in self.modules() if isinstance(m, Watched)]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_compute_again_with_the_same_noise(reentrant, forwards):
    model = prepare(Blocks(reentrant), COARSE)
    x = [torch.randn(5, 8) for _ in range(forwards)]
    loss = sum(model(one).square().sum() for one in x)
    for layer in model.watched():
        assert len(layer.seen) == forwards
    loss.backward()
    for layer in model.watched():
        assert len(layer.seen) == 2 * forwards
        again = layer.seen[forwards:]
        assert all(any(torch.equal(one, other) for other in again) for one in layer.seen[:forwards])
        assert not torch.equal(layer.seen[0], model.first.weight)
    assert at_rest(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not reentrant", "none"])
def test_gradients_with_checkpoints(reentrant):
    # What the backward pass knows of a weight is its noise: the logits' gradients follow from the noise that the forward pass saw and from
    # the gradient of the weight (but for the ends of the ranges, which get the ranges' gradient too).
    model = prepare(Blocks(reentrant), COARSE)
    for layer in model.watched():
        layer.register_full_backward_hook(lambda layer, grad_input, grad_output: None)
    model(torch.randn(5, 8)).square().sum().backward()
    for layer in model.watched():
        latent, quantizer = layer.parametrizations.weight.original.detach(), layer.parametrizations.weight[0]
        bits = quantizer.bits().double()
        slope = -(2**bits) / (2**bits - 1) * 0.6931471805599453 * (15 - bits) * (bits - 2) / 13
        noise = (layer.seen[0] - latent).double()
        grad = layer.parametrizations.weight.original.grad
        want = (grad.double() * noise).view(16, 4).sum(1) * slope
        ends = torch.zeros(8, 8, dtype=torch.bool)
        ends[torch.arange(8), latent.argmin(1)] = ends[torch.arange(8), latent.argmax(1)] = True
        whole = ~ends.view(16, 4).any(1)
        assert whole.any()
        torch.testing.assert_close(quantizer.logits.grad[whole].double(), want[whole], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_around_a_whole_model(reentrant):
    model, x = prepare(Blocks(None), COARSE), torch.randn(5, 8, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for layer in model.watched():
        first, second = layer.seen
        assert torch.equal(first, second)
    assert at_rest(model)
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- what can go wrong


class Failing(nn.Module):
    def __init__(self, error=RuntimeError):
        super().__init__()
        self.a, self.b, self.error, self.fails = nn.Linear(6, 6), nn.Linear(6, 6), error, False

    def forward(self, x):
        x = self.a(x)
        if self.fails:
            raise self.error("on purpose")
        return self.b(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_exception_leaves_the_model_usable(training):
    model, x = prepare(Failing(), COARSE).train(training), torch.randn(2, 6)
    model.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        model(x)
    assert at_rest(model)
    model.fails = False
    latent = model.a.parametrizations.weight.original
    with torch.no_grad():
        latent.add_(100)
    assert model.a.weight.min() > 50
    gradients(model, x)
    assert at_rest(model)
    assert latent.grad is not None


def test_an_interrupt_leaves_the_model_usable():
    model, x = prepare(Failing(KeyboardInterrupt), COARSE), torch.randn(2, 6)
    model.fails = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.fails = False
    with torch.no_grad():
        model.a.parametrizations.weight.original.add_(100)
    seen = []
    model.a.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.detach()))
    gradients(model, x)  # with noise and weights of now
    assert seen[0].min() > 50
    assert at_rest(model)


def test_an_exception_in_the_drawing_of_noise():
    model = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), COARSE)
    model[1].double()
    with pytest.raises(TypeError, match="got Double"):
        model(torch.randn(2, 6))
    assert at_rest(model)


def test_calling_a_submodule():
    model = prepare(Net(), COARSE)
    x = torch.randn(2, 5)
    assert not torch.equal(model.fc(x), model.fc(x))
    model.fc(x).sum().backward()
    assert model.fc.parametrizations.weight[0].logits.grad.any()
    assert model.conv.parametrizations.weight.original.grad is None
    assert at_rest(model)
    model.fc.eval()
    assert torch.equal(model.fc(x), model.fc(x))


def test_models_within_models():
    inner = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), COARSE)
    outer = prepare(nn.Sequential(inner, nn.Linear(6, 6)), {"1": COARSE})
    assert sum(begin_forward in m._forward_pre_hooks.values() for m in outer.modules()) == 2
    seen = []
    for layer in inner:
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer.weight.detach(), layer.weight.detach())))
    gradients(outer, torch.randn(3, 6))
    assert all(torch.equal(a, b) for a, b in seen)
    assert at_rest(outer)
    gradients(inner, torch.randn(3, 6))
    assert at_rest(outer)


def test_hooks_are_registered_once():
    model = prepare(Net(), {"conv": COARSE})
    prepare(model, {"fc": COARSE})
    assert list(model._forward_pre_hooks.values()) == [begin_forward]
    assert len(model._forward_hooks) == 1
    with pytest.raises(ValueError, match="must not be prepared already"):
        prepare(model, {"fc": COARSE})


def test_a_frozen_part_in_evaluation_mode():
    model = prepare(Net(), COARSE)
    model.conv.eval()
    x = images()
    frozen = model.conv.weight.detach()
    seen = []
    model.conv.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.detach()))
    y, grads = gradients(model, x)
    assert torch.equal(seen[0], frozen)
    assert not torch.equal(model(x), y)  # the rest has noise
    assert "conv.parametrizations.weight.0.logits" not in grads
    assert grads["conv.parametrizations.weight.original"].any()  # straight through
    assert weight_bits(model)["conv.weight"].unique().tolist() == [3.0]


@pytest.mark.parametrize("what", ["weights", "bits", "both"])
def test_frozen_parameters(what):
    model = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), COARSE)
    chain = model[0].parametrizations.weight
    chain.original.requires_grad_(what == "bits")
    chain[0].logits.requires_grad_(what == "weights")
    _, grads = gradients(model, torch.randn(3, 6))
    assert ("0.parametrizations.weight.original" in grads) == (what == "bits")
    assert ("0.parametrizations.weight.0.logits" in grads) == (what == "weights")
    assert grads["1.parametrizations.weight.original"].any()
    with torch.no_grad():
        model(torch.randn(3, 6))
    assert at_rest(model)


def test_a_layer_that_is_not_used_gets_no_gradient():
    class Skips(Failing):
        def forward(self, x):
            return self.a(x)

    model = prepare(Skips(), COARSE)
    _, grads = gradients(model, torch.randn(3, 6))
    assert {name.split(".")[0] for name in grads} == {"a"}


def test_constant_and_zero_weights_train():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[1].weight, 0.5)
    prepare(model, DiffQ())
    x = torch.randn(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = add_bit_parameters(optimizer, model)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    assert guard.skipped == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert model[1].weight.std() > 0


# ------------------------------------------------------------------------------------------------------------- copies, files, others


@pytest.mark.parametrize("when", ["fresh", "after a step"])
def test_deepcopy(when):
    model, x = prepare(Net(), COARSE), images()
    optimizer = torch.optim.Adam(model.parameters())
    add_bit_parameters(optimizer, model)
    if when == "after a step":
        gradients(model, x)
        optimizer.step()
    twin = copy.deepcopy(model)
    assert_same(gradients(twin, x), gradients(model, x))
    twin.fc.parametrizations.weight.original.data.zero_()
    twin.fc.parametrizations.weight[0].logits.data.fill_(5)
    assert model.fc.weight.abs().sum() > 0
    assert not twin.fc.weight.any()
    assert model.fc.parametrizations.weight[0].logits.max() < 5
    add_bit_parameters(torch.optim.Adam(twin.parameters()), twin)  # its bits are not in the other's optimizer
    assert torch.equal(size_penalty(copy.deepcopy(model)), size_penalty(model))


def test_state_dict():
    x, trained = images(), prepare(Net(), COARSE)
    for own in logits_of(trained):
        own.data.normal_()
    gradients(trained, x)
    state = trained.state_dict()
    assert sum(key.endswith("logits") for key in state) == 5
    other = prepare(Net(), COARSE)
    other(x)
    missing = other.load_state_dict(state)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert_same(gradients(other, x), gradients(trained, x))
    assert torch.equal(other.eval()(x), trained.eval()(x))
    meta = prepare(Net().to("meta"), COARSE)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta.eval()(x), trained.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepare(Net(), DiffQ(group_size=8)).load_state_dict(state)


def test_saving_a_whole_model(tmp_path):
    model, x = prepare(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), COARSE), images()
    model(x)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        torch.save(model, tmp_path / "model.pt")  # torch's own limit: state_dict is what it saves
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin = prepare(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), COARSE)
    twin.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(gradients(twin, x), gradients(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(dtype):
    x = images().to(dtype)
    for model in (prepare(Net().to(dtype), COARSE), prepare(Net(), COARSE).to(dtype)):  # the latter's logits are cast too
        y, grads = gradients(model, x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in grads.values())
        assert grads["fc.parametrizations.weight.0.logits"].dtype == model.fc.parametrizations.weight[0].logits.dtype
        assert weight_bits(model)["fc.weight"].dtype == torch.float32
        assert size_penalty(model).dtype == torch.float32
        model.eval()
        assert torch.equal(model(x), model(x))


def test_autocast():
    x, model = images(16), prepare(Net(), DiffQ(init_bits=6))
    exact = gradients(model, x)
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert model.fc.weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), exact[0], rtol=0.1, atol=0.05)
    for name in ("original", "0.logits"):
        name = f"fc.parametrizations.weight.{name}"
        got = dict(model.named_parameters())[name].grad
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), exact[1][name].flatten(), dim=0) > 0.97


@pytest.mark.parametrize("order", ["prepare, QModule", "QModule, prepare"])
def test_with_compressed_activations(order):
    x, activations, plain = images(16), ActivationConfig(bits=8, max_bits=8), prepare(Net(), COARSE)
    base = Net()
    model = QModule(prepare(base, COARSE), activations) if order == "prepare, QModule" else prepare(QModule(base, activations), COARSE)
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {"conv", "depthwise", "fc"} <= model.layer_bits().keys()
    y, grads = gradients(model, x)
    assert at_rest(model)
    assert not torch.equal(model(x), y)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in grads.values())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(model(x), model(x))
    assert size_penalty(model).item() == pytest.approx(size_penalty(plain).item())


def test_compiles_in_one_graph():
    x, model = images(), prepare(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 2)), COARSE)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    y, grads = gradients(compiled, x)
    assert {name.removeprefix("_orig_mod.") for name in grads} == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in grads.values())
    assert not torch.equal(compiled(x), y)  # noise is drawn in the graph, not when it was made
    assert_same(gradients(compiled, x), (y, grads))
    assert torch.equal(compiled.eval()(x), model.eval()(x))


def test_channels_last():
    x, model = images(), prepare(Net(), COARSE)
    want = model.eval()(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)
    gradients(model.train(), x.to(memory_format=torch.channels_last))
    assert model.conv.parametrizations.weight.original.grad.isfinite().all()


def test_two_processes(tmp_path):
    script = Path(__file__).with_name("diffq_processes.py")
    outputs = [tmp_path / f"{rank}.pt" for rank in range(WORLD)]
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "rendezvous"), str(outputs[rank])] for rank in range(WORLD)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stdout.read()
    (first, *counts), (second, *other_counts) = (torch.load(path) for path in outputs)
    assert counts == other_counts == [3, 1]  # the overflow in one process skips the step of both
    for a, b in zip(first, second, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
    assert all(g.any() for name, g in first[0].items() if name.endswith("logits"))
    assert all(p.isfinite().all() for p in first[-1].values())


# ------------------------------------------------------------------------------------------------------------- the optimizer


def parts(*options):
    model = prepare(Net(), COARSE)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.3)


def test_bits_get_a_group_of_their_own():
    model, optimizer = parts()
    before = [p for p in model.parameters() if not any(p is own for own in logits_of(model))]
    guard = add_bit_parameters(optimizer, model, lr=0.02)
    assert repr(guard) == "BitGuard(steps=0, skipped=0)"
    rest, bits = optimizer.param_groups
    assert [id(p) for p in rest["params"]] == [id(p) for p in before]
    assert [id(p) for p in bits["params"]] == [id(p) for p in logits_of(model)]
    assert (bits["lr"], bits["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.02, 0.0, 0.1, 0.3)
    start = [own.detach().clone() for own in logits_of(model)]
    gradients(model, images())
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, logits_of(model), strict=True))
    assert (guard.steps, guard.skipped) == (1, 0)


def test_bits_without_a_gradient_do_not_decay():
    model, optimizer = parts()
    add_bit_parameters(optimizer, model)
    start = [own.detach().clone() for own in logits_of(model)]
    for own in logits_of(model):
        own.grad = torch.zeros_like(own)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(start, logits_of(model), strict=True))


def test_a_second_optimizer():
    model = prepare(Net(), COARSE)
    logits = logits_of(model)
    main = torch.optim.SGD([p for p in model.parameters() if not any(p is own for own in logits)], lr=0.1)
    bits = torch.optim.Adam([{"params": []}])
    guard = add_bit_parameters(bits, model, lr=torch.tensor(0.1))
    before = copy.deepcopy(model.state_dict())
    gradients(model, images())
    main.step()
    bits.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed >= {name for name in dict(model.named_parameters()) if name != "conv.bias"}  # before a norm: no gradient
    assert guard.steps == 1


def test_errors_of_add_bit_parameters():
    model, optimizer = parts()
    with pytest.raises(TypeError, match="add_bit_parameters: optimizer must be a torch.optim.Optimizer; got Net"):
        add_bit_parameters(model, optimizer)
    with pytest.raises(TypeError, match="model must be an nn.Module; got list"):
        add_bit_parameters(optimizer, list(model.parameters()))
    for lr in (True, "1e-3", None):
        with pytest.raises(TypeError, match="lr must be a number of at least 0; got"):
            add_bit_parameters(optimizer, model, lr=lr)
    for lr in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match="lr must be a number of at least 0; got"):
            add_bit_parameters(optimizer, model, lr=lr)
    for other in (Net(), prepare(Net(), Uniform(4))):
        with pytest.raises(ValueError, match=r"model must have learned bits; call quantize.prepare\(model, quantize.DiffQ\(\)\) first"):
            add_bit_parameters(optimizer, other)
    assert len(optimizer.param_groups) == 1  # nothing of it happened
    add_bit_parameters(optimizer, model)
    with pytest.raises(ValueError, match="in one optimizer, once; they are in this optimizer already"):
        add_bit_parameters(optimizer, model)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="in one optimizer, once; they are in another optimizer already"):
        add_bit_parameters(other, model)
    del optimizer
    add_bit_parameters(other, model)  # the first one is gone


def test_a_scheduler_comes_after():
    model, optimizer = parts()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="must not have a learning-rate scheduler yet, which would not know the bits' group"):
        add_bit_parameters(optimizer, model)
    model, optimizer = parts()
    add_bit_parameters(optimizer, model, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    gradients(model, images())
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.05])


def test_distributed_data_parallel_comes_between(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 3)))
        prepare(parallel.module, COARSE)
        with pytest.raises(ValueError, match="model must be prepared before it is wrapped in DistributedDataParallel"):
            add_bit_parameters(torch.optim.SGD(parallel.parameters(), lr=0.1), parallel)
        model = prepare(nn.Sequential(nn.Linear(4, 3)), COARSE)
        parallel = nn.parallel.DistributedDataParallel(model)
        add_bit_parameters(torch.optim.SGD(parallel.parameters(), lr=0.1), parallel)
        assert torch.equal(size_penalty(parallel), size_penalty(model))
    finally:
        dist.destroy_process_group()


def spoil_logit(model, bad):
    logits_of(model)[2].grad[1] = bad


def spoil_norm(model, bad):
    model.norm.weight.grad[3] = bad


def spoil_prepared(model, bad):
    model.fc.parametrizations.weight.original.grad[1, 2] = bad


def spoil_frozen(model, bad):
    model.conv.parametrizations.weight.original.grad[0, 0, 1, 1] = bad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spoil", [spoil_logit, spoil_norm, spoil_prepared, spoil_frozen])
def test_a_bad_gradient_skips_the_whole_step(spoil, bad):
    model, optimizer = parts()
    guard = add_bit_parameters(optimizer, model, lr=0.1)
    model.conv.eval()  # its bits get no gradient
    gradients(model, images())
    optimizer.step()
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients(model, images())
    before |= {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "tracked" in name}
    spoil(model, bad)
    optimizer.step()
    assert repr(guard) == "BitGuard(steps=2, skipped=1)"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states["state"][index][name]) for name, value in state.items())
    gradients(model, images())
    optimizer.step()
    assert (guard.steps, guard.skipped) == (3, 1)
    assert not torch.equal(before["fc.bias"], model.fc.bias)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_tied_embedding_s_own_gradient_counts():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, i):
            return self.out(self.embedding(i))

    model = prepare(Language(), COARSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = add_bit_parameters(optimizer, model)
    found = model.embedding(torch.tensor([1, 2]))
    found.register_hook(lambda grad: grad * torch.inf)
    model.out(found).sum().backward()
    optimizer.step()
    assert guard.skipped == 1
    assert model.embedding.weight.isfinite().all()


def test_many_skipped_steps_are_warned_of():
    model = prepare(nn.Linear(4, 3), COARSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = add_bit_parameters(optimizer, model)

    def run(steps, bad):
        for i in range(steps):
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.nan if i < bad else 0.0)
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(100, 9)
    with pytest.warns(UserWarning, match="add_bit_parameters: 10 of the last 100 steps were skipped .*19 of 200 in all"):
        run(100, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(100, 3)
    assert (guard.steps, guard.skipped) == (300, 22)


def test_bits_are_projected_into_their_bounds():
    model = prepare(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), DiffQ())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    add_bit_parameters(optimizer, model, lr=1e4)
    for sign, bits in ((1, 2.0), (-1, 15.0)):
        for p in model.parameters():
            p.grad = torch.full_like(p, float(sign))
        optimizer.step()
        assert all(own.abs().max() == 8 for own in logits_of(model))
        for found in weight_bits(model).values():
            torch.testing.assert_close(found, torch.full_like(found, bits), rtol=0, atol=13 * 4e-4)
    optimizer.zero_grad()
    size_penalty(model).backward()
    assert all((own.grad > 0).all() for own in logits_of(model))  # the way back


class Norms(nn.Module):
    """A prepared layer between two parameters that are not."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(x))


def deadly_recipe(guarded, bad, steps=6):
    """Two optimizers under one gradient scaler, one clipping of all gradients, and an overflow in a layer that is not quantized."""
    torch.manual_seed(0)
    model = prepare(Norms(), COARSE)
    logits = logits_of(model)
    main = torch.optim.SGD([p for p in model.parameters() if not any(p is own for own in logits)], lr=0.01)
    bits = torch.optim.Adam([{"params": []}] if guarded else logits, lr=0.01)
    guard = add_bit_parameters(bits, model, lr=0.01) if guarded else None
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(steps):
        main.zero_grad()
        bits.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean() + size_penalty(model)
        scaler.scale(loss).backward()
        if step == 3:
            model.norm.weight.grad[2] = bad
        scaler.unscale_(main)
        scaler.unscale_(bits)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(main)
        scaler.step(bits)
        scaler.update()
    return model, guard


def test_the_recipe_that_killed_the_original():
    dead, _ = deadly_recipe(False, torch.nan)
    assert all(own.isnan().all() for own in logits_of(dead))
    for bad, skipped in ((torch.nan, 1), (torch.inf, 0)):  # clipping divides the others by infinity: zeros harm nobody
        model, guard = deadly_recipe(True, bad)
        assert all(p.isfinite().all() for p in model.parameters())
        assert (guard.steps, guard.skipped) == (6, skipped)


# ------------------------------------------------------------------------------------------------------------- the size


def spread_out(model, deviation=2.0):
    """Bits all over their bounds."""
    for own in logits_of(model):
        own.data.normal_(std=deviation)
    return model


def bytes_of_codes(model, rounded):
    """float64: of all groups, the last of which may be short."""
    total = 0.0
    for q in quantizers(model):
        bits = q.config.min_bits + (q.config.max_bits - q.config.min_bits) * q.logits.double().sigmoid()
        if rounded:
            bits = bits + (bits.detach().round() - bits.detach())
        total = total + bits.repeat_interleave(q.group_size)[: q.numel].sum() / 8
    return total


def other_bytes_of_linear(model):
    """Bytes of a Linear's file beside codes: half a byte a group for its bits, a range a channel and the bias."""
    q = quantizers(model)[0]
    return -(-q.logits.numel() // 2) + 8 * q.channels + 4 * model.bias.numel()


@pytest.mark.parametrize("numel", [(64, 32), (7, 9)])
def test_size_is_the_sum_by_hand(numel):
    model = spread_out(prepare(nn.Linear(*numel), DiffQ(group_size=8)))
    want = (bytes_of_codes(model, False) + other_bytes_of_linear(model)) / MIB
    size = size_penalty(model)
    assert (size.shape, size.dtype) == ((), torch.float32)
    assert size.item() == pytest.approx(want.item(), rel=1e-6)
    got = torch.autograd.grad(size, logits_of(model))
    for a, b in zip(got, torch.autograd.grad(want, logits_of(model)), strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-4, atol=0)
    rounded = size_penalty(model.eval())
    want = (bytes_of_codes(model, True) + other_bytes_of_linear(model)) / MIB
    assert rounded.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(rounded, logits_of(model)), torch.autograd.grad(want, logits_of(model)), strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-4, atol=0)  # straight through


MODELS = {
    "net": Net,
    "tied": Tied,
    "linear": lambda: nn.Linear(33, 7),
    "LSTM": lambda: First(nn.LSTM(5, 4, num_layers=2)),
    "GRUCell": lambda: Cell(nn.GRUCell),
    "attention": Attention,
    "conv and norm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)),
    "some not prepared": lambda: nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8)),
}


@pytest.mark.parametrize("span", ["channel", "tensor", "group"])
@pytest.mark.parametrize("group_size", [3, 8, 0])
@pytest.mark.parametrize("name", MODELS)
def test_size_is_that_of_the_file(name, group_size, span):
    model = spread_out(prepare(MODELS[name](), DiffQ(group_size=group_size, range=span, init_bits=5)), 1.0).eval()
    got, want = size_penalty(model).item() * MIB, size_report(model).bytes
    assert abs(got - want) <= len(quantizers(model)), (got, want)


def test_size_is_that_of_the_saved_file(tmp_path):
    model = spread_out(prepare(Net(), DiffQ()), 1.0).eval()
    packed = quantize.convert(model)
    quantize.save(packed, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    written = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert abs(written - size_penalty(model).item() * MIB) <= len(quantizers(model)) + 64  # alignment of the file's tensors
    x = images()
    torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_size_takes_no_time_the_second_time(monkeypatch):
    model = prepare(Net(), DiffQ())
    first = size_penalty(model)

    def refuse(model):
        raise AssertionError("converted again")

    monkeypatch.setattr("quantize.packed.size_report.bytes_beside_learned_bits", refuse)
    assert torch.equal(size_penalty(model), first)
    model.eval()
    size_penalty(model)


def test_size_leaves_the_model_alone():
    model, x = prepare(Net(), DiffQ()), images()
    model.norm.eval()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    size_penalty(model)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in (model, model.norm, model.fc)] == [True, False, True]
    gradients(model, x)


@pytest.mark.parametrize("first", [True, False], ids=["at the first call", "later"])
def test_size_never_raises_because_of_values(first):
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), DiffQ(group_size=8))
    if not first:
        size_penalty(model)
    own = logits_of(model)[0]
    with torch.no_grad():
        own[3] = torch.nan
        model[1].parametrizations.weight.original[2, 2] = torch.inf
        model[1].bias[0] = torch.nan
    size = size_penalty(model)
    assert size.isfinite()
    size.backward()
    assert own.grad[3] == 0
    assert own.grad[[0, 1, 2, 4]].all()
    top = copy.deepcopy(model)
    logits_of(top)[0].data[3] = 60.0
    assert torch.equal(size_penalty(top), size)
    assert size_penalty(model, target_size=1.0).isfinite()


def test_errors_of_size_penalty():
    model = prepare(nn.Linear(256, 64, bias=False), DiffQ(group_size=8, min_bits=2.5, max_bits=6, init_bits=4))
    with pytest.raises(TypeError, match="size_penalty: model must be an nn.Module; got int"):
        size_penalty(3)
    with pytest.raises(ValueError, match="size_penalty: model must have learned bits"):
        size_penalty(Net())
    for wrong in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="target_size must be a number of MiB; got"):
            size_penalty(model, wrong)
    least = (256 * 64 * 3 / 8 + 1024 + 512) / MIB  # 3 is the lowest whole number of bits; half a byte a group; a range a channel
    for wrong in (least - 1e-4, 0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"target_size must be at least {least:.4f} MiB, the size with min_bits everywhere; got"):
            size_penalty(model, wrong)
    assert size_penalty(model, least * (1 + 1e-9)).isfinite()


def test_the_penalty_for_missing_a_target():
    model = spread_out(prepare(nn.Linear(256, 64), DiffQ()), 1.0)
    size = size_penalty(model.eval()).item()
    model.train()
    assert size_penalty(model, size).item() == pytest.approx(0, abs=1e-6)
    for factor in (0.5, 0.9, 1.2, 3.0):
        missed = abs(1 / factor - 1)
        penalty = size_penalty(model, size * factor)
        assert penalty.item() == pytest.approx(missed, abs=0.0051)
        (grad, *_) = torch.autograd.grad(penalty, logits_of(model))
        assert bool(((grad > 0) == (factor < 1)).all())
    assert size_penalty(model, size * 1.002).item() < 0.0003  # quadratic near by


@pytest.mark.parametrize("part", [0.4, 0.55, 1.4])
def test_the_penalty_alone_reaches_its_target(part):
    torch.manual_seed(2)
    model = spread_out(prepare(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64)), DiffQ(init_bits=6)), 0.5)
    target = part * size_penalty(model.eval()).item()
    model.train()
    optimizer = torch.optim.Adam([{"params": []}])
    add_bit_parameters(optimizer, model, lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (10 * size_penalty(model, target)).backward()
        optimizer.step()
    assert size_penalty(model.eval()).item() == pytest.approx(target, rel=0.01)
    assert size_report(model).bytes / MIB == pytest.approx(target, rel=0.01)


def test_training_with_a_target():
    # Weights and bits together: the loss falls and the file is as large as was asked for.
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    model = prepare(copy.deepcopy(teacher), DiffQ(group_size=16))
    x = torch.randn(256, 16)
    target, size = teacher(x).detach(), 0.7 * size_penalty(model).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = add_bit_parameters(optimizer, model, lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (F.mse_loss(model(x), target) + 10 * size_penalty(model, size)).backward()
        optimizer.step()
    assert guard.skipped == 0
    assert size_report(model.eval()).bytes / MIB == pytest.approx(size, rel=0.02)
    assert F.mse_loss(model(x), target) < 0.05 * target.var()
    bits = torch.cat(list(weight_bits(model).values()))
    assert bits.unique().numel() > 1  # not all alike: the bits were learned
