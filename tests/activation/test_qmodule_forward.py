"""A model's style does not decide its memory: functional calls, layers with a forward of their own, and whatever else a forward does."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from exact_levels import EPS, EXACT, ONE_BIT, exact_norms, halves, levels
from torch import nn

from quantize import ActivationConfig, QModule

FIXED = ActivationConfig(bits=2, max_bits=2)


class Calls(nn.Module):
    """A module whose forward is a function of x and of a weight of its own."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.function(x, self.weight)


def step(model, x, seed=0):
    """Output, gradients of x and parameters, and what was saved that is neither a parameter nor tiny."""
    torch.manual_seed(seed)
    leaf, saved = x.clone().requires_grad_(), []
    own = {p.data_ptr() for p in model.parameters()}
    keep = lambda t: saved.append(t) if t.data_ptr() not in own and t.numel() > 64 else None  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t) or t, lambda t: t):
        y = model(leaf)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), [leaf, *parameters], allow_unused=True)
    return y.detach(), grads, saved


CALLS = {
    "F.conv1d": (lambda x, w: F.conv1d(x.flatten(2), w, stride=2), (4, 6, 3)),
    "F.conv2d": (lambda x, w: F.conv2d(x, w, None, 1, 1), (4, 6, 3, 3)),
    "F.conv2d by keywords": (lambda x, w: F.conv2d(input=x, weight=w, padding="same", dilation=2), (4, 6, 3, 3)),
    "F.conv2d with lists of one": (lambda x, w: F.conv2d(x, w, None, [2], [1]), (4, 6, 3, 3)),
    "F.conv3d": (lambda x, w: F.conv3d(x[:, None], w, padding=1), (4, 1, 3, 3, 3)),
    "F.conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), (6, 4, 3, 3)),
    "F.linear": (lambda x, w: F.linear(x.flatten(1), w), (5, 6 * 64)),
    "F.batch_norm": (lambda x, w: F.batch_norm(x, None, None, w, None, True, 0.1, EPS), (6,)),
    "torch.batch_norm": (lambda x, w: torch.batch_norm(x, w, None, None, None, True, 0.1, EPS, True), (6,)),
}
EXACT_CALLS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu in place": lambda x: F.relu(x * 1, inplace=True),
    "torch.relu": torch.relu,
    "x.relu()": lambda x: x.relu(),
    "torch.relu_": lambda x: torch.relu_(x * 1),
    "x.relu_()": lambda x: (x * 1).relu_(),
    "F.relu_": lambda x: F.relu_(x * 1),
    "F.relu6": lambda x: F.relu6(x),
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 3.0),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.leaky_relu in place": lambda x: F.leaky_relu(x * 1, negative_slope=0.2, inplace=True),
    "F.dropout": lambda x: F.dropout(x, 0.3),
    "F.dropout in place": lambda x: F.dropout(x * 1, p=0.3, inplace=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool2d by keywords": lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True),
    "F.max_pool2d with lists of one": lambda x: F.max_pool2d(x, [2], [2]),
    "F.max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "F.max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 2),
    "F.max_pool3d": lambda x: F.max_pool3d(x[:, None], 2),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, 2, padding=1),
    "F.avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 3, 2),
    "F.avg_pool3d": lambda x: F.avg_pool3d(x[:, None], 2),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, None)),
    "F.adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5),
}


@pytest.mark.parametrize("name", CALLS)
def test_lossy_calls(name):
    function, shape = CALLS[name]
    plain = Calls(function, *shape)
    is_norm = "batch_norm" in name
    ours = QModule(copy.deepcopy(plain), ONE_BIT if is_norm else EXACT)
    x = (halves if is_norm else levels)(3, 6, 8, 8)
    with exact_norms():
        (y, grads, saved), (expected, exact, _) = step(ours, x), step(plain, x)
    assert torch.equal(y, expected)
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.uint8 in {t.dtype for t in saved}
    assert not [t for t in saved if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert len(ours.layer_bits()) == 1


@pytest.mark.parametrize("name", EXACT_CALLS)
def test_exact_calls(name):
    plain = Calls(lambda x, w: EXACT_CALLS[name](x), 1)
    ours = QModule(copy.deepcopy(plain), FIXED)
    x = torch.randn(3, 6, 8, 8) * 3
    (y, grads, saved), (expected, exact, _) = step(ours, x), step(plain, x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(grads[0], exact[0], rtol=1e-6, atol=0)
    outputs = {"avg": 0, "max": y.numel()}
    limit = next((n for key, n in outputs.items() if key in name), -(-x.numel() // 8))
    assert sum(t.nbytes for t in saved if t.data_ptr() != 0 and t.shape != y.shape or t.dtype == torch.uint8) <= limit
    assert ours.layer_bits() == {}


class ActivatedNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: an nn layer's subclass with a forward of its own."""

    def __init__(self, channels):
        super().__init__(channels, EPS)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(x)


class PaddedConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ActivatedNorm(6), (3, 6, 8, 8)),
        (PaddedConv(6, 4, 2), (3, 6, 8, 8)),
        (StandardizedConv(6, 4, 3), (3, 6, 8, 8)),
        (ScaledLinear(40, 5), (3, 40)),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(40, 5)), (3, 40)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_subclasses_keep_their_forward_and_are_compressed(layer, shape):
    plain = nn.Sequential(layer)
    is_norm = isinstance(layer, nn.BatchNorm2d)
    ours = QModule(copy.deepcopy(plain), ONE_BIT if is_norm else EXACT)
    assert type(ours[0]) is type(layer)
    x = (halves if is_norm else levels)(*shape)
    with exact_norms():
        (y, grads, saved), (expected, exact, _) = step(ours, x), step(plain, x)
    assert torch.equal(y, expected)
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert torch.uint8 in {t.dtype for t in saved}
    assert list(ours.layer_bits()) == ["0"]


def test_subclasses_go_by_the_mapping():
    for config, lossy in (({"*": FIXED, "0": None}, False), ({"0": FIXED}, True), ({"*": None, "0": FIXED}, True)):
        ours = QModule(nn.Sequential(PaddedConv(6, 4, 2)), config)
        assert (torch.uint8 in {t.dtype for t in step(ours, levels(3, 6, 8, 8))[2]}) == lossy


def test_a_module_used_twice_in_one_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu = nn.Linear(16, 16), nn.ReLU()

        def forward(self, x):
            return self.relu(self.fc(x)) + self.relu(self.fc(x.flip(0)))

    plain = Twice()
    ours = QModule(copy.deepcopy(plain), EXACT)
    x = levels(4, 16)
    for got, want in zip(step(ours, x)[1], step(plain, x)[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_in_place_relu_between_layers_that_keep_their_input():
    # conv keeps x packed, so the ReLU may overwrite it; and what the ReLU changed is not taken for what was packed before.
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            x = x * 1
            left = self.a(x)
            return left + self.b(F.relu(x, inplace=True))

    plain = InPlace()
    ours = QModule(copy.deepcopy(plain), EXACT)
    x = levels(3, 6, 8, 8)
    x[:, 1, 0, 0] = 0.0
    y, grads, _ = step(ours, x)
    reference = copy.deepcopy(plain)
    leaf = x.clone().requires_grad_()
    expected = reference.a(leaf) + reference.b(F.relu(leaf))  # out of place: the plain model itself would raise
    assert torch.equal(y, expected.detach())
    exact = torch.autograd.grad(expected.square().sum(), [leaf, *reference.parameters()])
    for got, want in zip(grads[1:3], exact[1:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    for got, want in zip(grads, exact, strict=True):
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.9999


# ---- what a forward leaves behind


def outside():
    """What functional calls outside of any QModule save."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        F.relu(torch.randn(10, requires_grad=True))
    return set(saved)


def test_nothing_is_left_after_a_forward_or_an_exception():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = PaddedConv(6, 4, 2)
            self.bad = False

        def forward(self, x):
            x = self.conv(x)
            if self.bad:
                raise KeyError("on purpose")
            return x.relu()

    class Fails(PaddedConv):
        def forward(self, x):
            raise KeyError("on purpose")

    model = QModule(Raises(), FIXED)
    x = levels(3, 6, 8, 8)
    model(x)
    assert outside() == {torch.float32}
    for bad in (model, QModule(nn.Sequential(Fails(6, 4, 2), nn.ReLU()), FIXED)):
        bad.bad = True
        for _ in range(3):
            with pytest.raises(KeyError, match="on purpose"):
                bad(x)
        assert outside() == {torch.float32}
        bad.bad = False
    saved = step(model, x)[2]
    assert torch.uint8 in {t.dtype for t in saved}
    assert list(model.layer_bits()) == ["conv"]


def test_threads_have_forwards_of_their_own():
    plain = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), PaddedConv(4, 4, 2), nn.Flatten(), nn.Linear(144, 3))
    x = levels(3, 6, 8, 8)
    results, barrier = {}, threading.Barrier(4)

    def work(number):
        barrier.wait()
        for _ in range(5):
            if number == 3:
                results[number] = outside()
            else:
                model = models[number]
                y = model(x.clone().requires_grad_())
                y.sum().backward()
                results[number] = model.layer_bits()

    models = [QModule(copy.deepcopy(plain), ActivationConfig(bits=b, max_bits=b)) for b in (2, 4, 8)]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(results[n].values()) for n in range(3)] == [{2.0}, {4.0}, {8.0}]
    assert results[3] == {torch.float32}


def test_no_grad_inside_and_outside():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x).relu()
            return self.b(x)

    model = QModule(Partly(), FIXED)
    model(torch.randn(4, 40)).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None
    with torch.no_grad():
        assert not model(torch.randn(4, 40)).requires_grad
        with torch.enable_grad():
            assert model(torch.randn(4, 40)).requires_grad


def test_frozen_parts_keep_nothing():
    model = QModule(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)), FIXED)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(levels(3, 6, 8, 8)).sum().backward()
    assert {t.dtype for t in saved if t.numel() > 3 * 128 // 8} == {torch.uint8}  # nobody asks for the gradient that weights are for
    assert sum(t.nbytes for t in saved if t.dtype == torch.uint8) == 3 * 128 * 2 // 8
