"""Sensitivities measured on a GPU: the CPU's, up to what its sums of float32 may differ by."""

import copy

import pytest
import torch
from sensitivity_models import Residual, images, trained

import quantize
from quantize import DiffQ, DoReFa, PowerOfTwo, Ternary

pytestmark = pytest.mark.gpu


def both(method, metric, choices, **more):
    model, batches = trained(Residual()), images(16, 9)
    on_cpu = quantize.measure_sensitivity(model, batches, choices, method, metric, progress=False, **more)
    moved = [(inputs.cuda(), targets.cuda()) for inputs, targets in batches]
    on_gpu = quantize.measure_sensitivity(copy.deepcopy(model).cuda(), moved, choices, method, metric, progress=False, **more)
    assert on_gpu.matrix.device.type == "cpu" and on_gpu.samples == on_cpu.samples == 25
    assert torch.equal(on_gpu.bytes, on_cpu.bytes) and torch.equal(on_gpu.bit_ops, on_cpu.bit_ops)
    assert on_gpu.other_bytes == on_cpu.other_bytes and on_gpu.configs == on_cpu.configs
    return on_gpu, on_cpu


@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("method", ["gauss_newton", "clado", "diagonal"])
def test_weights(method, metric):
    """Quantized weights are bit-equal, so the rest is float32's rounding in the logits."""
    on_gpu, on_cpu = both(method, metric, [(2, None), (None, None), (4, None)])
    torch.testing.assert_close(on_gpu.matrix, on_cpu.matrix, rtol=1e-3, atol=1e-5 * float(on_cpu.matrix.abs().max()))


@pytest.mark.parametrize("method", ["gauss_newton", "diagonal"])
def test_activations(method):
    """A code next to a threshold may fall to either side."""
    on_gpu, on_cpu = both(method, "kl", [(4, 4), (8, 8)])
    torch.testing.assert_close(on_gpu.values, on_cpu.values, rtol=0.05, atol=1e-3 * float(on_cpu.values.max()))


@pytest.mark.parametrize(
    "quantizer, choices", [(PowerOfTwo, [(4, None)]), (DoReFa, [(2, None)]), (DiffQ, [(3, None)]), (Ternary, [(2, None)])]
)
def test_quantizers(quantizer, choices):
    on_gpu, on_cpu = both("gauss_newton", "kl", choices, quantizer=quantizer)
    torch.testing.assert_close(on_gpu.matrix, on_cpu.matrix, rtol=1e-3, atol=1e-5 * float(on_cpu.matrix.abs().max()))


def test_resumed(tmp_path):
    model, batches = trained(Residual()).cuda(), [(x.cuda(), y.cuda()) for x, y in images(8, 8, 8)]
    want = quantize.measure_sensitivity(model, batches, [(2, None), (4, 4)], "clado", progress=False)
    count = [0]

    def hook(*args):
        count[0] += 1
        if count[0] == 40:
            raise KeyboardInterrupt

    model.fc.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        quantize.measure_sensitivity(model, batches, [(2, None), (4, 4)], "clado", checkpoint=tmp_path / "c", progress=False)
    assert (tmp_path / "c").exists()
    got = quantize.measure_sensitivity(model, batches, [(2, None), (4, 4)], "clado", checkpoint=tmp_path / "c", progress=False)
    torch.testing.assert_close(got.matrix, want.matrix, rtol=1e-4, atol=1e-6 * float(want.matrix.abs().max()))


def test_half_precision_and_autocast():
    """bfloat16 puts the logits off by about 2^-8, and 2 bits of weights move them a tenth, whose square is measured."""
    model, batches = trained(Residual()).cuda(), [(x.cuda(), y.cuda()) for x, y in images(16)]
    halves, half = [(x.bfloat16(), y) for x, y in batches], copy.deepcopy(model).bfloat16()

    def values(model, batches):
        return quantize.measure_sensitivity(model, batches, [(2, None)], progress=False).values

    with torch.autocast("cuda", torch.bfloat16):
        mixed = values(model, batches)
    rounded = values(copy.deepcopy(half).float(), [(x.float(), y) for x, y in halves])
    for got, want in ((values(half, halves), rounded), (mixed, values(model, batches))):
        assert float((got - want).norm()) <= 0.08 * float(want.norm())
