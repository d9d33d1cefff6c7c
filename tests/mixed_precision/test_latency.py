"""measure_latency: a table of the packed kernels' seconds that allocate() takes."""

import copy

import pytest
import torch
from torch import nn

import quantize
from quantize.packed.pending import Pending

CHOICES = [(2, 8), (8, 8), (4, None), (None, None)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)
    return nn.Sequential(*layers)


@pytest.fixture
def batch():
    return torch.randn(4, 3, 8, 8), torch.randint(4, (4,))


def test_every_layer_and_choice_has_a_time(model, batch):
    sensitivity = quantize.measure_sensitivity(model, [batch], CHOICES, progress=False)
    before = copy.deepcopy(model.state_dict())
    table = quantize.measure_latency(model, batch[0], sensitivity, repeats=3)
    assert table.dtype == torch.float64 and table.shape == (3, 4)
    assert bool((table > 0).all()) and float(table.max()) < 10
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_groups_are_the_sum_of_their_modules(model, batch, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("quantize.mixed_precision.latency.time.perf_counter", lambda: next(clock))  # each call takes one second
    choices = [(2, None), (8, None)]
    sensitivity = quantize.measure_sensitivity(model, [batch], choices, groups={"convolutions": ["0", "3"]}, progress=False)
    assert quantize.measure_latency(model, batch[0], sensitivity, repeats=1).tolist() == [[2, 2], [1, 1]]


def test_calls_of_one_layer_add_up_and_layers_without_calls_take_no_time(batch, monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    clock = iter(range(10**6))
    monkeypatch.setattr("quantize.mixed_precision.latency.time.perf_counter", lambda: next(clock))
    model, inputs = Twice(), torch.randn(4, 8)
    sensitivity = quantize.measure_sensitivity(model, [(inputs, torch.zeros(4).long())], [(4, None)], progress=False)
    assert quantize.measure_latency(model, inputs, sensitivity, repeats=2).tolist() == [[2], [0], [1]]


def test_zeros_will_do(model, batch):
    sensitivity = quantize.measure_sensitivity(model, [batch], CHOICES[:1], progress=False)
    assert bool((quantize.measure_latency(model, torch.zeros_like(batch[0]), sensitivity, repeats=1) > 0).all())


def test_a_budget_of_seconds(model, batch):
    sensitivity = quantize.measure_sensitivity(model, [batch], CHOICES[:2], progress=False)
    latency = torch.tensor([[1.0, 4.0], [1.0, 2.0], [1.0, 2.0]])
    allocation = quantize.allocate(sensitivity, latency=latency, max_latency=5)
    assert allocation.choice == {"0": (2, 8), "3": (8, 8), "6": (8, 8)} and allocation.latency == 5
    assert quantize.prepare(model, allocation)[3].activation_quantizer.bits == 8


def test_dictionaries_of_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, *, features):
            return self.layer(features)

    inputs = {"features": torch.randn(4, 8)}
    sensitivity = quantize.measure_sensitivity(Named(), [(inputs, torch.zeros(4).long())], CHOICES[:2], progress=False)
    assert bool((quantize.measure_latency(Named(), inputs, sensitivity, repeats=1) > 0).all())


def test_bad_arguments_are_named(model, batch):
    sensitivity = quantize.measure_sensitivity(model, [batch], CHOICES[:1], progress=False)
    with pytest.raises(TypeError, match="sensitivity must be a Sensitivity; got dict"):
        quantize.measure_latency(model, batch[0], {})
    with pytest.raises(TypeError, match="repeats must be an integer of at least 1; got 1.5"):
        quantize.measure_latency(model, batch[0], sensitivity, repeats=1.5)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1; got 0"):
        quantize.measure_latency(model, batch[0], sensitivity, repeats=0)
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        quantize.measure_latency(None, batch[0], sensitivity)
    with pytest.raises(ValueError, match="another model"):
        quantize.measure_latency(nn.Sequential(nn.Linear(3, 3)), batch[0], sensitivity)
    for inputs, found in ((None, "NoneType"), (batch[0].numpy(), "ndarray"), (5, "int"), ({"x": 5}, "int")):
        with pytest.raises(TypeError, match=f"^measure_latency: inputs must be Tensors; got {found}"):
            quantize.measure_latency(model, inputs, sensitivity)
    for inputs in (batch[0][:0], ()):
        with pytest.raises(ValueError, match="^measure_latency: inputs must hold samples; got an empty one"):
            quantize.measure_latency(model, inputs, sensitivity)
    with pytest.raises(ValueError, match="^measure_latency: inputs must be finite; got NaN or infinite ones"):
        quantize.measure_latency(model, batch[0] * torch.nan, sensitivity)
    with pytest.raises(TypeError, match="^measure_latency: weight of layer '0' must be float32, .*; got torch.float64"):
        quantize.measure_latency(copy.deepcopy(model).double(), batch[0].double(), sensitivity)
    prepared = quantize.prepare(copy.deepcopy(model), quantize.Uniform(4))
    with pytest.raises(ValueError, match="^measure_latency: model must be a float model; '0.weight' is prepared"):
        quantize.measure_latency(prepared, batch[0], sensitivity)
    with pytest.raises(ValueError, match="^measure_latency: model must be a float model; got a converted one"):
        quantize.measure_latency(quantize.convert(prepared), batch[0], sensitivity)


class Binary(nn.Module):
    """Two binary convolutions: one hands bits to the other, whose output goes straight into a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.first = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.stem(x)
        return (self.b(self.norm(self.a(self.first(x)))) + x).mean((2, 3))


@pytest.fixture
def binary():
    model, inputs = Binary().eval(), torch.randn(2, 3, 8, 8)
    batches, options = [(inputs, torch.tensor([0, 1]))], {"quantizer": quantize.XNOR, "skip": ["stem"], "progress": False}
    return model, inputs, quantize.measure_sensitivity(model, batches, [(1, 1)], **options)


def binary_calls(function):
    """Shapes that packed_binary_conv2d was given, in order."""
    with torch.no_grad(), torch.autograd.profiler.profile(record_shapes=True) as profile:
        function()
    return [event.input_shapes[0] for event in profile.function_events if event.name == "quantize::packed_binary_conv2d"]


def test_what_is_timed_is_what_runs(binary):
    model, inputs, sensitivity = binary
    packed = quantize.convert(quantize.prepare(copy.deepcopy(model), {"*": None, "a": quantize.XNOR(), "b": quantize.XNOR()}))
    want = binary_calls(lambda: packed(inputs))
    assert want == [[2, 16, 6, 6], [2, 6, 6, 8]]  # floats, then bits
    assert binary_calls(lambda: quantize.measure_latency(model, inputs, sensitivity, repeats=2)) == 4 * want


def test_sums_are_timed_with_their_layer(binary, monkeypatch):
    model, inputs, sensitivity = binary
    clock = [0.0]

    class Slow(Pending):
        def __init__(self, call, x, *args):
            def slow(*args, **kwargs):
                clock[0] += 1  # a second
                return call(*args, **kwargs)

            super().__init__(slow, x, *args)

    monkeypatch.setattr("quantize.packed.kernels.Pending", Slow)
    monkeypatch.setattr("quantize.mixed_precision.latency.time.perf_counter", lambda: clock[0])
    assert quantize.measure_latency(model, inputs, sensitivity, repeats=1).tolist() == [[0], [1]]


def test_layers_are_not_timed_with_the_one_before_them(monkeypatch):
    """The first convolution's codes are computed when the second one asks for them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.LazyLinear(2)).eval()
    inputs, clock = torch.randn(4, 3, 8, 8), [0.0]
    model(inputs)
    sensitivity = quantize.measure_sensitivity(model, [(inputs, torch.zeros(4).long())], [(8, 8)], progress=False)
    codes = Pending.codes

    def slow(self, *args):
        call = self._call
        self._call = lambda *args, **named: (clock.__setitem__(0, clock[0] + 5), call(*args, **named))[1]
        return codes(self, *args)

    def slower(self, wrap):
        return Pending(
            wrap(lambda *args, **named: (clock.__setitem__(0, clock[0] + 3), self._call(*args, **named))[1]),
            self._x,
            self._steps,
            self._layer,
        )

    monkeypatch.setattr(Pending, "codes", slow)  # five seconds of the second layer's own
    monkeypatch.setattr(Pending, "around", slower)  # three of the first
    monkeypatch.setattr("quantize.mixed_precision.latency.time.perf_counter", lambda: clock[0])
    assert quantize.measure_latency(model, inputs, sensitivity, repeats=1).tolist() == [[3], [5], [0]]


def test_transformer_layers_are_timed_in_full_precision():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(64, 2)).eval()
    inputs = torch.randn(2, 4, 16)
    sensitivity = quantize.measure_sensitivity(model, [(inputs, torch.tensor([0, 1]))], [(4, None), (None, None)], progress=False)
    table = dict(zip(sensitivity.layers, quantize.measure_latency(model, inputs, sensitivity, repeats=1), strict=True))
    assert all(bool((table[name] > 0).all()) for name in ("0.linear1", "0.linear2", "2"))
