"""Batch norms and layers in front of a sign as one comparison: equal to the arithmetic they stand for, at and around every threshold."""

import pytest
import torch
from torch import nn

from quantize.packed.convert import _as_computed
from quantize.packed.thresholds import of_affine, of_products

INFINITY = torch.tensor(torch.inf)
EDGES = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])


def around(threshold):
    """Floats at the thresholds, next to them, and elsewhere: [rows, channels]."""
    near = [threshold, torch.nextafter(threshold, INFINITY), torch.nextafter(threshold, -INFINITY)]
    others = torch.cat([torch.randn(200), 100 * torch.randn(50), EDGES])
    rows = torch.cat([torch.stack(near).nan_to_num(0.0, 3e38, -3e38), others[:, None].expand(-1, len(threshold))])
    return rows


@pytest.mark.parametrize("kind", ["sign", "unit"])
@pytest.mark.parametrize("relu", [False, True])
def test_affine(kind, relu):
    scale, shift = torch.randn(300), torch.randn(300)
    scale[:2], shift[1], shift[2], scale[3], scale[4] = 0, -1, 0, 1e-30, -1e-38
    scale[5], shift[5] = 2.0, 0.5
    threshold, flip = of_affine(scale, shift, kind, relu)
    x = around(threshold)
    seen = x.clamp(min=0) if relu else x
    y = (seen.double() * scale.double() + shift.double()).float()
    assert torch.equal((x < threshold) ^ flip.bool(), y < 0 if kind == "sign" else y > 0.5)


def test_constant_channels():
    threshold, flip = of_affine(torch.zeros(3), torch.tensor([1.0, -1.0, 0.0]), "sign")
    assert threshold.tolist() == [-torch.inf] * 3 and flip.tolist() == [0, 1, 0]
    threshold, flip = of_affine(torch.ones(2), torch.tensor([0.0, -0.0]), "sign")
    assert threshold.tolist() == [0, 0] and flip.tolist() == [0, 0]  # as a sign without a norm


def test_batch_norm_as_pytorch_computes_it():
    norm = nn.BatchNorm2d(64).eval()
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_(), norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 3)
        norm.weight[3] = 0
        threshold, flip = of_affine(*_as_computed(norm), "sign")
        x = 3 * torch.randn(50, 64, 7, 7)
        got = (x < threshold.view(-1, 1, 1)) ^ flip.view(-1, 1, 1).bool()
        assert torch.equal(got, norm(x) < 0)


def test_products():
    scales, bias, threshold = torch.randn(200), 20 * torch.randn(200), torch.randn(200)
    scales[0], threshold[1], threshold[2] = 0, torch.inf, -torch.inf
    flip = torch.randint(2, (200,), dtype=torch.uint8)
    whole, flipped = of_products(scales, bias, threshold, flip, 37)
    assert whole.dtype == torch.int32
    dot = torch.arange(-37, 38)[:, None]
    assert torch.equal((dot < whole) ^ flipped.bool(), (dot.float() * scales + bias < threshold) ^ flip.bool())
    whole, flipped = of_products(scales, None, threshold, flip, 37)
    assert torch.equal((dot < whole) ^ flipped.bool(), (dot.float() * scales < threshold) ^ flip.bool())
