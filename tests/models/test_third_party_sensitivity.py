"""torchvision's and timm's models, unchanged, through measure_sensitivity: what prepared copies give, with prefixes left out."""

import copy

import pytest
import torch
from catalog import models
from torch.nn import functional as F

import quantize
from quantize.mixed_precision.measure import _layers
from quantize.mixed_precision.replay import call
from quantize.mixed_precision.switches import SwitchedModel

pytestmark = pytest.mark.third_party

CHOSEN = models(
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/densenet121",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/convnext_tiny",
    "timm/skresnet18",
    "timm/repvgg_a0",
    "timm/mobilenetv3_large_100",
    "timm/vit_tiny_patch16_224",
)


def logits(model, x):
    with torch.no_grad():
        return model(x).double()


@pytest.mark.parametrize("entry", CHOSEN, ids=[model.key for model in CHOSEN])
def test_measured(entry):
    """Every third layer: its KL is a prepared copy's; most passes leave much of the model out."""
    model, x = entry.build(entry.small), entry.inputs(4, entry.small)
    with torch.no_grad():
        model.train()(x)  # running statistics that mean something
    model.eval()
    names = list(_layers(model, (), None))
    skip = [name for i, name in enumerate(names) if i % 3]
    state = copy.deepcopy(model.state_dict())
    sensitivity = quantize.measure_sensitivity(model, [(x, None)], [(2, None)], "diagonal", skip=skip, progress=False)
    assert len(sensitivity.layers) == (len(names) + 2) // 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    reference = logits(model, x).log_softmax(1)
    for name, value in list(zip(sensitivity.layers, sensitivity.values[:, 0].tolist(), strict=True))[:: max(1, len(names) // 12)]:
        prepared = quantize.prepare(copy.deepcopy(model), {"*": None, name: quantize.Uniform(2)})
        want = F.kl_div(logits(prepared, x).log_softmax(1), reference, reduction="batchmean", log_target=True)
        assert value == pytest.approx(float(want), rel=1e-6, abs=1e-12)
    total = sum(int(sensitivity.bytes[i, 0]) for i in range(len(sensitivity.layers))) + sensitivity.other_bytes
    config = {"*": None, **dict.fromkeys(sensitivity.layers, quantize.Uniform(2))}
    assert total == quantize.size_report(quantize.prepare(copy.deepcopy(model), config)).bytes


@pytest.mark.parametrize("entry", CHOSEN, ids=[model.key for model in CHOSEN])
def test_no_layer_runs_from_the_start(entry):
    """Nearly every layer's pass leaves something out, and gives the complete pass' bits."""
    model, x = entry.build(entry.small).eval(), entry.inputs(2, entry.small)
    names = list(_layers(model, (), None))
    switched = SwitchedModel(model, [[name] for name in names], [quantize.Uniform(2)])
    with torch.no_grad():
        _, record = call(switched.replay.record, x)
        starts = switched.starts(record)
        assert sum(start > 1 for start in starts) >= 0.9 * len(starts)
        for layer in range(0, len(names), max(1, len(names) // 6)):
            with switched.chosen(layer, 0):
                assert torch.equal(call(switched.replay.run, x, record, starts[layer]), call(switched.model, x))
