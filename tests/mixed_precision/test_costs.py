"""Bytes and bit operations by layer and choice: their sums are size_report's and summary's of the prepared model, for any assignment."""

import copy
import functools
import random

import pytest
import torch
from sensitivity_models import Attention, Keywords, Recurrent, Residual, Tied, images, trained
from torch import nn

import quantize
from quantize import XNOR, DiffQ, DoReFa, PowerOfTwo, Ternary, Uniform
from quantize.mixed_precision.choices import config_of
from quantize.mixed_precision.costs import bit_operations, stored_bytes
from quantize.mixed_precision.measure import _layers

CHOICES = [(2, None), (3, 8), (4, 4), (8, 8)]
FLOAT = (None, None)


class Wide(nn.Module):
    """Batch norms that fold and that do not, biases or none, grouped, transposed and dilated convolutions, a layer that is skipped."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8, affine=False), nn.ReLU6())
        self.norm = nn.BatchNorm2d(8)  # before its layer: it stays
        self.up, self.down = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 5, 3, stride=2, dilation=2, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.hidden, self.last = nn.Linear(5, 7, bias=False), nn.Linear(7, 4)

    def forward(self, x):
        x = self.stem(x)
        x = self.norm(x + self.grouped(x))
        x = self.bn(self.down(self.up(x))).relu()
        return self.last(self.hidden(x.mean((2, 3))))


class Normed(nn.Sequential):
    """What XNOR takes: a batch norm before every layer but the first."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardtanh(),
            nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 4),
        )  # fmt: skip


def by_bits(weight, activation):
    """A method for each number of bits."""
    if weight == 1:
        return XNOR(activation)
    return Ternary(activation) if weight == 2 else Uniform(weight, activation) if weight == 8 else PowerOfTwo(weight, True, activation)


MODELS = {
    "residual": (Residual, (3, 6, 6)),
    "wide": (Wide, (3, 6, 6)),
    "normed": (Normed, (3, 6, 6)),
    "attention": (lambda: Attention(True), (4, 5)),
    "recurrent": (Recurrent, (4, 5)),
    "tied": (Tied, None),
}
CASES = [
    *((name, Uniform, [*CHOICES, FLOAT]) for name in MODELS),
    *((name, DiffQ, [(2, None), (5, 8), (9, None), FLOAT]) for name in ("residual", "wide", "tied")),
    ("wide", PowerOfTwo, [(3, None), (4, 8), FLOAT]),
    ("wide", DoReFa, [(1, 1), (2, 2), (4, None), (16, 16), FLOAT]),
    ("normed", DoReFa, [(1, 1), (2, None), FLOAT]),
    ("normed", XNOR, [(1, 1), (1, None), FLOAT]),
    ("normed", by_bits, [(1, 1), (2, 8), (4, None), (8, 8), FLOAT]),
    ("wide", functools.partial(Uniform, scale="learned"), [(2, 4), (8, None), FLOAT]),
    ("wide", Uniform, [FLOAT]),
    ("wide", Uniform, [FLOAT, (4, 4)]),
]
IDS = [f"{name}, {getattr(q, '__name__', 'learned')} {len(c)}" for name, q, c in CASES]


def sample(shape):
    return torch.randint(12, (1, 4)) if shape is None else torch.randn(1, *shape)


def setting(case):
    name, quantizer, choices = case
    define, shape = MODELS[name]
    members = _layers(trained_model := trained(define()), ["stem*"] if name == "wide" else (), None)
    return trained_model, shape, list(members.values()), tuple(config_of(quantizer, choice, "test") for choice in choices)


def assigned(model, groups, configs, picks):
    """A prepared copy with a configuration for every group; the copy alone if none is quantized."""
    chosen = {name: configs[k] for names, k in zip(groups, picks, strict=True) for name in names if configs[k] is not None}
    return quantize.prepare(copy.deepcopy(model), {"*": None, **chosen}) if chosen else copy.deepcopy(model)


def assignments(groups, configs, count=12):
    """All alike, and at random."""
    chance = random.Random(0)
    return [[k] * len(groups) for k in range(len(configs))] + [[chance.randrange(len(configs)) for _ in groups] for _ in range(count)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bytes_of_any_assignment(case):
    model, _, groups, configs = setting(case)
    table, others = stored_bytes(model, groups, configs)
    assert table.shape == (len(groups), len(configs)) and table.dtype == torch.long and table.min() > 0 and others >= 0
    # A batch norm between two layers becomes thresholds if the second one's input is a sign: then a layer's bytes depend on its neighbour.
    signs = any(config is not None and config.activation_bits == 1 for config in configs)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    for picks in assignments(groups, configs):
        want = quantize.size_report(assigned(model, groups, configs, picks)).bytes
        assert abs(int(table[range(len(groups)), picks].sum()) + others - want) <= (17 * channels if signs else 0), picks


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bit_operations_of_any_assignment(case):
    model, shape, groups, configs = setting(case)
    if case[0] == "recurrent":
        groups = groups[-1:]  # summary has no MACs of recurrent layers
    one = sample(shape)
    table = bit_operations(model, torch.cat([one] * 3), groups, configs)
    names = {name for group in groups for name in group}
    for picks in assignments(groups, configs, 3):
        report = quantize.summary(assigned(model, groups, configs, picks), one)
        rows = [row for row in report.layers if row.name in names and row.kind != "attention"]
        assert sum(row.bit_ops for row in rows) == int(table[range(len(groups)), picks].sum())


def test_bytes_are_those_of_the_file(tmp_path):
    """What is written, less its header."""
    model, _, groups, configs = setting(("wide", Uniform, [*CHOICES, FLOAT]))
    table, others = stored_bytes(model, groups, configs)
    picks = [3, 1, 4, 0, 2][: len(groups)]
    prepared = assigned(model, groups, configs, picks)
    quantize.calibrate(prepared, [inputs for inputs, _ in images(4)])
    quantize.save(quantize.convert(prepared), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == int(table[range(len(groups)), picks].sum()) + others


def test_attention_and_calls():
    """A layer's calls count together; keywords are taken; recurrent layers have none."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.fc(x))

    assert bit_operations(Twice(), torch.randn(5, 6), [["fc"]], [Uniform(4, 8)]).tolist() == [[2 * 36 * 4 * 8]]
    inputs = {"left": torch.randn(7, 5), "right": torch.randn(7, 4), "mode": "product"}
    table = bit_operations(Keywords(), inputs, [["left"], ["right", "last"]], [Uniform(2), None])
    assert table.tolist() == [[40 * 64, 40 * 1024], [56 * 64, 56 * 1024]]
    assert bit_operations(Recurrent(), torch.randn(2, 4, 5), [["lstm"], ["last"]], [Uniform(2)]).tolist() == [[0], [21 * 64]]
    assert bit_operations(Attention(True), torch.randn(2, 4, 5), [["attention"]], [Uniform(2)]).tolist() == [[3 * 4 * 64 * 64]]


def test_other_floats_count_with_their_own_bits():
    model, x = Residual().bfloat16(), torch.randn(1, 3, 6, 6).bfloat16()
    table = bit_operations(model, x, [["fc"], ["conv1"]], [Uniform(4), Uniform(4, 8), None])
    assert table[0].tolist() == [24 * 4 * 16, 24 * 4 * 8, 24 * 16 * 16]
    assert table[:, 2].tolist() == [row.bit_ops for row in quantize.summary(model, x).layers if row.name in ("fc", "conv1")][::-1]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(training):
    model = trained(Wide()).train(training)
    state, names = copy.deepcopy(model.state_dict()), [(n, type(m)) for n, m in model.named_modules()]
    groups, configs, x = list(_layers(model, (), None).values()), (Uniform(2, 2), None), torch.randn(2, 3, 6, 6)
    generator = torch.get_rng_state()
    stored_bytes(model, groups, configs)
    bit_operations(model, x, groups, configs)
    assert all(m.training == training for m in model.modules()) and names == [(n, type(m)) for n, m in model.named_modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
