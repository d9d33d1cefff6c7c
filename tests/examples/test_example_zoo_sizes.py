"""Of every model of the zoo with learned bits: what is reported, penalized and written is the same number of bytes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import create_model

ARCHS = ["lenet", "mobilenet", "mobilenetv2", "densenet", "dla", "dla_simple", "efficientnet_b0", "resnet18_cifar", "resnet20", "senet"]


def payload(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    json.loads(data[8 : 8 + length])
    return len(data) - 8 - length


@pytest.mark.parametrize("arch", [*ARCHS, "wide_resnet16_4"])
def test_the_size_is_that_of_the_file(arch, tmp_path):
    model = quantize.prepare(create_model(arch, 10, 1, 1 if arch == "lenet" else 4), quantize.DiffQ(group_size=8))
    weights = 0
    for module in model.modules():
        if isinstance(getattr(module, "logits", None), nn.Parameter):
            module.logits.data.normal_(std=2)
            weights += 1
    report = quantize.size_report(model.eval())
    quantize.save(quantize.convert(model), tmp_path / "model.safetensors")
    assert payload(tmp_path / "model.safetensors") == report.bytes
    with torch.no_grad():
        assert abs(float(quantize.size_penalty(model)) * 2**20 - report.bytes) <= weights  # codes end at whole bytes
