"""torchvision's and timm's models, unchanged, through QModule: the same model before, during and after, and ten times less memory."""

import copy

import pytest
import torch
from catalog import MODELS

import quantize
from quantize import ActivationConfig
from quantize.activation.memory_report import SMALL
from quantize.activation.state import override

pytestmark = pytest.mark.third_party
TESTED = [model for model in MODELS if model.tested]


def tensors(output):
    """All tensors of an output: some models return a tuple with the outputs of auxiliary classifiers."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output for t in tensors(part) if t is not None]


def step(model, x, state, seed=1):
    """One training step from `state`: outputs, gradients by name, buffers afterwards. Dropout's numbers depend on `seed` alone."""
    model.load_state_dict(state)
    model.zero_grad()
    torch.manual_seed(seed)
    with override(generator=torch.Generator().manual_seed(seed)):
        outputs = tensors(model.train()(x))
    torch.stack([(t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in outputs]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients, {name: b.clone() for name, b in model.named_buffers()}


def evaluate(model, x, state):
    model.load_state_dict(state)
    with torch.no_grad():
        return tensors(model.eval()(x))


def assert_equal(ours, plain):
    """Bit for bit, names and order included."""
    ours, plain = (dict(enumerate(v)) if isinstance(v, list) else v for v in (ours, plain))
    assert list(ours) == list(plain)
    assert not [name for name in plain if not torch.equal(ours[name], plain[name])]


def cosine(a, b):
    """Of two sets of gradients, each as one vector."""
    dot = sum((a[name] * b[name]).sum() for name in b)
    return float(dot / (sum(t.square().sum() for t in a.values()) * sum(t.square().sum() for t in b.values())).sqrt())


@pytest.mark.parametrize("entry", TESTED, ids=[model.key for model in TESTED])
def test_unchanged_model(entry):
    model, x = entry.build(entry.small), entry.inputs(entry.batch, entry.small)
    state = copy.deepcopy(model.state_dict())
    evaluated = evaluate(model, x, state)
    outputs, gradients, buffers = step(model, x, state)

    model.load_state_dict(state)
    model = quantize.QModule(model, ActivationConfig(bits=8, max_bits=8))
    assert_equal(model.state_dict(), state)
    assert_equal(evaluate(model, x, state), evaluated)
    ours = step(model, x, state)
    assert_equal(ours[0], outputs)
    assert_equal(ours[2], buffers)
    assert list(ours[1]) == list(gradients)
    assert cosine(ours[1], gradients) >= 0.99

    model = quantize.QModule(model, ActivationConfig(enabled=False))
    ours = step(model, x, state)
    assert_equal(ours[0], outputs)
    assert_equal(ours[1], gradients)
    del ours, gradients

    model = quantize.QModule(model, ActivationConfig(bits=2, max_bits=2))
    report = quantize.memory_report(model, x)
    assert report.ratio >= 10 or entry.below
    assert sum(row.bytes for row in report.layers) == report.saved_bytes
    assert not [row for row in report.layers if row.bytes > SMALL and row.bits > 8 and not row.reason]


def test_catalog_is_as_wide_as_promised():
    transformers = [m for m in TESTED if m.transformer]
    for library in ("torchvision", "timm"):
        assert sum(m.library == library and m not in transformers for m in TESTED) >= 16
    assert len(transformers) >= 3
