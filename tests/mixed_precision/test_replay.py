"""Passes that begin at a layer: the same bits as complete ones, for every style of model, and only what follows is computed."""

import copy
import math
from collections import Counter

import pytest
import torch
from sensitivity_models import (
    Attention,
    BorrowsWeight,
    Checkpointed,
    Depends,
    Functional,
    Keywords,
    Recurrent,
    Residual,
    Several,
    Shared,
    Tied,
    WritesEarlier,
    WritesInput,
    images,
    kl,
    logits_of,
    rows,
    trained,
    twin,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantize
from quantize import Uniform
from quantize.mixed_precision import survey
from quantize.mixed_precision.measure import _layers
from quantize.mixed_precision.replay import call
from quantize.mixed_precision.switches import SwitchedModel

CONFIGS = (Uniform(2), Uniform(3, 4))


def series(*sizes):
    return [(torch.randn(n, 4, 5), torch.randint(3, (n,))) for n in sizes]


def keywords(*sizes):
    return [({"left": torch.randn(n, 5), "right": torch.randn(n, 4), "mode": "product"}, torch.randint(3, (n,))) for n in sizes]


MODELS = {  # how it is made, and its batches
    "residual": (Residual, images),
    "functional": (Functional, rows),
    "shared": (Shared, rows),
    "writes what came earlier": (WritesEarlier, rows),
    "writes its input": (WritesInput, rows),
    "several outputs": (Several, rows),
    "depends on data": (Depends, rows),
    "borrows a weight": (BorrowsWeight, rows),
    "checkpointed": (Checkpointed, rows),
    "recurrent": (Recurrent, series),
    "attention": (lambda: Attention(True), series),
    "attention, samples second": (lambda: Attention(False), series),
    "tied": (Tied, lambda *sizes: [(torch.randint(12, (n, 4)), torch.randint(3, (n,))) for n in sizes]),
    "keywords": (Keywords, keywords),
}


def build(name):
    define, data = MODELS[name]
    return trained(define()), data(4, 3)


class Work(TorchDispatchMode):
    """Counts products with weights."""

    NAMES = ("convolution", "mm", "addmm", "bmm", "linear", "lstm", "gru_cell", "mkldnn_rnn_layer")

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))

    def since(self):
        total, self.count = sum(self.count.values()), Counter()
        return total


@pytest.mark.parametrize("name", MODELS)
def test_the_long_way_gives_the_same(name):
    """The whole measurement: every layer and pair, against prepared copies."""
    model, batches = build(name)
    choices = [(2, None), (3, 4)]
    pairs = quantize.measure_sensitivity(model, batches, choices, "clado", progress=False)
    single = quantize.measure_sensitivity(model, batches, choices, "diagonal", progress=False)
    reference = logits_of(model, batches)

    def growth(*entries):
        chosen = {member: CONFIGS[i % 2] for i in entries for member in pairs.members[pairs.layers[i // 2]]}
        return kl(reference, logits_of(twin(model, chosen, batches), batches))

    def rounding(*growths):
        """Logits of order 1 are good to 3e-7: some machines' matrix products round by where their operands lie. KL is |dz|^2 / 2."""
        return 3e-7 * sum(math.sqrt(2 * value) for value in growths)

    count = 2 * len(pairs.layers)
    singles = [growth(i) for i in range(count)]
    for i in range(count):
        assert float(single.matrix[i, i]) == pytest.approx(singles[i], rel=0, abs=rounding(singles[i]))
        assert float(pairs.matrix[i, i]) == pytest.approx(singles[i], rel=0, abs=rounding(singles[i]))
        j = (i + 3) % count
        both = growth(i, j) if i // 2 != j // 2 else singles[i] + singles[j]
        want = (both - singles[i] - singles[j]) / 2
        assert float(pairs.matrix[i, j]) == pytest.approx(want, rel=0, abs=rounding(both, singles[i], singles[j]))
    assert min(singles) > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("writes what came earlier", "borrows a weight")])
def test_same_bits_and_less_work(name):
    model, batches = build(name)
    switched = SwitchedModel(model, list(_layers(model, (), None).values()), CONFIGS)
    work = Work()
    with torch.no_grad(), work:
        switched.calibrate([inputs for inputs, _ in batches], lambda inputs: call(switched.model, inputs))
        for inputs, _ in batches:
            work.since()
            complete = call(switched.model, inputs)
            all_of_it = work.since()
            output, record = call(switched.replay.record, inputs)
            assert torch.equal(*(getattr(o, "logits", o) for o in (output, complete))) and work.since() == all_of_it
            shares = []
            for layer, start in enumerate(switched.starts(record)):
                for choice in (0, 1, None):
                    with switched.chosen(layer, choice):
                        work.since()
                        partial = call(switched.replay.run, inputs, record, start)
                        shares.append((start, work.since() / all_of_it))
                        complete = call(switched.model, inputs)
                    assert torch.equal(*(getattr(o, "logits", o) for o in (partial, complete)))
    assert min(shares)[1] <= 1 and max(shares)[1] <= 0.5  # of the last layer little more than itself


def chain(count):
    """Nested, so that calls are left out at several depths."""
    inner = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(count - 2)])
    return nn.Sequential(nn.Conv2d(3, 4, 1), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class WithLogits(nn.Sequential):
    """Returns an object."""

    def forward(self, x):
        return Keywords.Output(super().forward(x))


def passes(method, layers, choices, batches):
    """Products with weights that a chain of layers needs, `choices` quantized ones, without activation bits."""
    two = layers + sum(2 * layers - i for i in range(layers))  # the trial on two samples
    if method == "clado":
        each = sum(layers + choices * sum(layers - j for j in range(i + 1, layers)) for i in range(layers))
    else:
        each = sum(layers - i for i in range(layers))
    return two + batches * (layers + choices * each)


@pytest.mark.parametrize("wrap", [lambda model: model, WithLogits], ids=["tensor", "object"])
@pytest.mark.parametrize("method", ["gauss_newton", "clado", "diagonal"])
def test_only_what_follows_is_computed(method, wrap, monkeypatch):
    counted = []
    original = survey.Survey.matrix

    def matrix(self):
        with Work() as work:
            result = original(self)
        counted.append(work.count["convolution"] + work.count["addmm"])
        return result

    monkeypatch.setattr(survey.Survey, "matrix", matrix)
    batches = images(3, 2, classes=3)
    quantize.measure_sensitivity(wrap(chain(6)), batches, [(2, None), (None, None), (4, None)], method, progress=False)
    assert counted == [passes(method, 6, 2, 2)]


def test_user_hooks_change_what_they_return():
    """They run after calls that are left out, too."""
    model, batches = trained(Residual()), images(4)
    model.conv1.register_forward_hook(lambda module, args, output: output * 0.5)
    model.bn1.register_forward_pre_hook(lambda module, args: (args[0] + 0.25,))
    sensitivity = quantize.measure_sensitivity(model, batches, [(2, None)], "diagonal", progress=False)
    reference = logits_of(model, batches)
    for name, value in zip(sensitivity.layers, sensitivity.values[:, 0], strict=True):
        assert float(value) == pytest.approx(kl(reference, logits_of(twin(model, {name: Uniform(2)}, batches), batches)), rel=1e-9)


def test_a_borrowed_weight_is_found_behind_a_fine_choice():
    """16 bits change the outputs too little to tell; 2 bits are measured all the same."""
    model, batches = trained(BorrowsWeight()), rows(5)
    model.last.weight.data.mul_(0.01)
    choices = [(16, None), (2, None)]
    sensitivity = quantize.measure_sensitivity(model, batches, choices, "diagonal", quantizer=quantize.DiffQ, progress=False)
    reference, two = logits_of(model, batches), quantize.DiffQ(min_bits=2, max_bits=2, init_bits=2)
    for name, value in zip(sensitivity.layers, sensitivity.values[:, 1], strict=True):
        assert float(value) == pytest.approx(kl(reference, logits_of(twin(model, {name: two}, batches), batches)), rel=1e-8)


def test_a_failed_pass_leaves_nothing_behind():
    model, batches = trained(Residual()), images(4)
    switched = SwitchedModel(model, [["conv1"], ["fc"]], CONFIGS)
    fail = []
    switched.model.bn2.register_forward_pre_hook(lambda module, args: 1 / 0 if fail else None)
    with torch.no_grad():
        inputs = batches[0][0]
        want, record = switched.replay.record(inputs)
        for function in (switched.replay.record, lambda x: switched.replay.run(record, 0, x)):
            fail.append(1)
            with pytest.raises(ZeroDivisionError), switched.chosen(0, 0):
                function(inputs)
            fail.clear()
            assert torch.equal(switched.model(inputs), want)
            output, again = switched.replay.record(inputs)
            assert torch.equal(output, want) and switched.starts(again) == switched.starts(record)


def test_assign_is_prepare():
    """A choice for every layer at once."""
    model, batches = trained(Residual()), images(4)
    names = ["conv1", "conv2", "fc"]
    switched = SwitchedModel(model, [[name] for name in names], CONFIGS)
    with torch.no_grad():
        switched.calibrate([inputs for inputs, _ in batches], switched.model)
        switched.assign([1, None, 0])
        want = logits_of(twin(model, {"conv1": CONFIGS[1], "fc": CONFIGS[0]}, batches), batches)
        assert torch.equal(switched.model(batches[0][0]).double(), want)
        switched.assign([None] * 3)
        assert torch.equal(switched.model(batches[0][0]), copy.deepcopy(model)(batches[0][0]))
