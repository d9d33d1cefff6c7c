"""torchvision's and timm's models, unchanged, through prepare, convert, save and load."""

import pytest
import torch
from catalog import models
from test_third_party import tensors

import quantize
from quantize.packed.modules import PackedLayer
from quantize.weight.prepare import LAYERS

pytestmark = pytest.mark.third_party

CHOSEN = models(
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/densenet121",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/efficientnet_b0",
    "torchvision/googlenet",
    "timm/resnet18",
    "timm/repvgg_a0",
    "timm/ghostnet_100",
    "timm/mobilenetv3_large_100",
    "timm/vit_tiny_patch16_224",
)


def distance(outputs, want):
    """The largest of the outputs' relative distances."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, want, strict=True))


@pytest.mark.parametrize("config", [quantize.PowerOfTwo(4), quantize.Uniform(8, activation_bits=8)], ids=["po2", "8x8"])
@pytest.mark.parametrize("entry", CHOSEN, ids=[model.key for model in CHOSEN])
def test_packed(entry, config, tmp_path):
    model, x = entry.build(entry.small), entry.inputs(2, entry.small)
    layers = sum(isinstance(m, LAYERS) for m in model.modules())
    quantize.prepare(model, config)
    with torch.no_grad():
        model.train()(x)  # running statistics that mean something, and grids for the activations
        want = tensors(model.eval()(x))
        packed = quantize.convert(model)
        got = tensors(packed(x))
    assert sum(isinstance(m, PackedLayer) for m in packed.modules()) >= 0.9 * layers - 2  # attention's output layers stay decoded
    # Codes of activations next to a threshold may fall on either side after the batch norms are folded. What that is worth in a network
    # with random weights (a quarter of mobilenetv3's output) is what rounding the input does to the prepared model.
    tolerance = 1e-4
    if config.activation_bits is not None:
        with torch.no_grad():
            moved = [tensors(model(x * (1 + 1e-4 * torch.randn_like(x)))) for _ in range(3)]
        tolerance = max(0.05, 2 * max(distance(outputs, want) for outputs in moved))
    assert distance(got, want) <= tolerance
    quantize.save(packed, tmp_path / "model.safetensors")
    loaded = quantize.load(entry.build(entry.small), tmp_path / "model.safetensors")
    with torch.no_grad():
        for a, b in zip(tensors(loaded(x)), got, strict=True):
            assert torch.equal(a, b)
    fast = quantize.capture(packed)
    for _ in range(2):
        for a, b in zip(tensors(fast(x)), got, strict=True):
            assert torch.equal(a, b)
    quantize.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert quantize.size_report(packed).bytes == quantize.size_report(loaded).bytes < quantize.size_report(packed).float_bytes / 3
