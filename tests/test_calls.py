"""Inputs by name: what tokenizers and data loaders give."""

import torch
from torch import nn

import quantize
from quantize.calls import call


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, pixel_values, labels=None, scale=1.0):
        return self.norm(self.conv(pixel_values)).mean((2, 3)) * scale


class Whole(ByName):
    def forward(self, batch):
        return super().forward(batch["pixel_values"])


def test_names_and_whole_mappings():
    x = torch.randn(4, 3, 8, 8)
    batch = {"pixel_values": x, "labels": torch.arange(4) % 2, "scale": 2.0}
    model = ByName().eval()
    assert torch.equal(call(model, batch), model(x, scale=2.0)) and torch.equal(call(model, x), model(x))
    assert torch.equal(call(model, x, None), model(x))
    whole = Whole().eval()
    assert torch.equal(call(whole, batch), whole(batch)) and torch.equal(call(whole, {"batch": batch}), whole(batch))
    identity = nn.Identity()
    assert call(identity, {1: 2}) == {1: 2} and call(identity, {"a": 2}) == {"a": 2}


def test_whoever_calls_models():
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4) % 2
    batch, config = {"pixel_values": x}, quantize.ActivationConfig(bits=2, max_bits=2)
    model = quantize.QModule(ByName(), config)
    assert quantize.memory_report(model, batch).saved_bytes == quantize.memory_report(model, x).saved_bytes
    loss = nn.functional.cross_entropy
    torch.manual_seed(0)
    named = quantize.variance_report(model, [(batch, y)], loss, draws=2)
    torch.manual_seed(0)
    assert named.overall == quantize.variance_report(model, [(x, y)], loss, draws=2).overall > 0
    assert quantize.summary(ByName(), batch).macs == quantize.summary(ByName(), x).macs > 0
    one, two = (quantize.prepare(ByName(), quantize.Uniform(8, activation_bits=8)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    assert torch.equal(quantize.calibrate(one, [batch])(x), quantize.calibrate(two, [x])(x))
    one, two = (quantize.reestimate_batch_norm(m, [b]).norm for m, b in ((one, batch), (two, x)))
    assert torch.equal(one.running_mean, two.running_mean)
