"""Packed layers where PyTorch does more than call them: inference mode, derivatives of torch.func, tracing and export."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import quantize
from quantize import DiffQ, Ternary, Uniform


def packed(config, seed=0):
    torch.manual_seed(seed)
    model = quantize.prepare(nn.Sequential(nn.Linear(64, 16)), config)
    model(torch.randn(5, 64))
    return quantize.convert(model)


@pytest.mark.parametrize("config", [Uniform(8, activation_bits=8), Uniform(8), quantize.XNOR()], ids=str)
@pytest.mark.parametrize("make", [lambda m: m, copy.deepcopy, lambda m: m.double().float()], ids=["convert", "deepcopy", "to"])
def test_changes_in_inference_mode_are_seen(config, make):
    x = torch.randn(2, 64)
    with torch.inference_mode():
        model, other = make(packed(config)), make(packed(config, seed=1))
        before = model(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other(x)) and not torch.equal(model(x), before)


def test_models_made_in_inference_mode_are_as_others(tmp_path):
    x = torch.randn(2, 64)
    with torch.inference_mode():
        model = packed(Uniform(8, activation_bits=8))
        quantize.save(model, tmp_path / "f")
        loaded = quantize.load(nn.Sequential(nn.Linear(64, 16)), tmp_path / "f")
    for made in (model, loaded):
        assert not any(buffer.is_inference() for buffer in made.buffers())
        assert torch.equal(made(x), packed(Uniform(8, activation_bits=8))(x))


@pytest.mark.parametrize("config", [Uniform(8), Uniform(8, activation_bits=8), Ternary(), DiffQ()], ids=str)
def test_derivatives_of_torch_func(config):
    model, x, direction = packed(config), torch.randn(2, 64) * 2, torch.randn(2, 64)
    leaf = x.clone().requires_grad_()
    want = model(leaf)
    (slope,) = torch.autograd.grad(want.sum(), leaf)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
    value, tangent = torch.func.jvp(model, (x,), (direction,))
    for got in (value, dual.primal):
        torch.testing.assert_close(got, want.detach())
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(dual.tangent, tangent)
    torch.testing.assert_close(tangent.sum(), (slope * direction).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).sum())(x), slope)
    forward, backward = torch.func.jacfwd(model)(x), torch.func.jacrev(model)(x)
    torch.testing.assert_close(forward, backward)
    torch.testing.assert_close(torch.func.vmap(model)(x), want.detach())
    assert torch.equal(model(x), packed(config)(x))  # nothing of a transform is kept


@pytest.mark.parametrize("config", [Uniform(4), Uniform(4, activation_bits=8), Ternary(), DiffQ(), quantize.XNOR()], ids=str)
def test_export_leaves_nothing_behind(config):
    model, x = packed(config), torch.randn(2, 64)
    want = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), want)
    for other in (model, copy.deepcopy(model), packed(config)):
        assert type(other(x)) is torch.Tensor and torch.equal(other(x), want)


@pytest.mark.parametrize("config", [Uniform(4), Uniform(4, activation_bits=8), Ternary()], ids=str)
def test_export_of_any_batch(config):
    model, x = packed(config), torch.randn(8, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for rows in (2, 3, 11):
        torch.testing.assert_close(exported(x[:1].expand(rows, -1)), model(x[:1]).expand(rows, -1))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("config", [Uniform(4), Uniform(4, activation_bits=8), DiffQ()], ids=str)
def test_fake_tensors_are_not_kept(config, called):
    model, x = packed(config), torch.randn(2, 64)
    want = packed(config)(x)
    if called:
        model(x)
    graph = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(graph(x), want)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("config", [Uniform(4), Uniform(4, activation_bits=8), quantize.XNOR()], ids=str)
def test_jit_trace_before_the_first_call(config):
    model, x = packed(config), torch.randn(2, 64)
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))


def test_layers_without_values():
    layer = quantize.convert(quantize.prepare(nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 16)), quantize.XNOR()).eval()).to("meta")
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 16)


@pytest.mark.parametrize("dims", [1, 2])
def test_export_of_any_batch_of_images(dims):
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
    model = nn.Sequential(conv(16, 16, 3, padding=1), nn.ReLU(), conv(16, 32, 3)).eval()
    model, x = quantize.convert(quantize.prepare(model, Uniform(4))), torch.randn(4, 16, *[8] * dims)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for rows in (2, 3, 4):
        torch.testing.assert_close(exported(x[:rows]), model(x[:rows]))


def binary():
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardtanh(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Hardtanh()
    model = nn.Sequential(*layers, nn.Conv2d(16, 8, 3)).eval()
    return quantize.convert(quantize.prepare(model, {"*": quantize.XNOR(), "0": None}))


def test_export_leaves_hooks_watched():
    model, x, seen = binary(), torch.randn(2, 3, 12, 12), []
    want = model(x)
    model[3].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.export.export(model, (x,))
    seen.clear()
    assert torch.equal(model(x), want)
    assert type(seen[0]) is torch.Tensor and seen[0].dtype == torch.float32


@pytest.mark.parametrize("config", [Uniform(4), Uniform(8, activation_bits=8), quantize.PowerOfTwo(4)], ids=str)
def test_symbolic_traces_have_a_node_for_each_layer(config):
    convs = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(1), nn.ConvTranspose2d(8, 8, 1), nn.Conv2d(8, 8, 3)
    model = quantize.prepare(nn.Sequential(*convs, nn.Flatten(), nn.Linear(512, 4)), config)
    x = torch.randn(2, 3, 12, 12)
    model(x)
    model = quantize.convert(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == list("0123456")
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("config", [Uniform(4), Uniform(8, activation_bits=8)], ids=str)
def test_jit_trace_behind_a_layer_that_trains(config):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), torch.randn(2, 3, 12, 12)
    quantize.prepare(model, {"*": config, "0": None})(x)
    model = quantize.convert(model)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
