"""Learned bits together with checkpointing, exceptions, copies, compilation, other processes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffq_models import COARSE, Net, assert_same, at_rest, gradients, images, logits_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from quantize import ActivationConfig, DiffQ, QModule, add_bit_parameters, prepare, size_penalty, weight_bits
from quantize.weight import diffq
from quantize.weight.diffq import begin_forward

replicate = sys.modules["torch.nn.parallel.replicate"]  # whose name is also the function's


class Watched(nn.Linear):
    """Remembers the weights that it computed with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def forward(self, x):
        weight = self.weight
        self.seen.append(weight.detach().clone())
        return F.linear(x, weight, self.bias)


class Blocks(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(Watched(8, 8), nn.ReLU(), nn.Dropout(0.3), Watched(8, 8)) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        return self.last(x)

    def watched(self):
        return [m for m in self.modules() if isinstance(m, Watched)]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_compute_again_with_the_same_noise(reentrant, forwards):
    model = prepare(Blocks(reentrant), COARSE)
    x = [torch.randn(5, 8) for _ in range(forwards)]
    loss = sum(model(one).square().sum() for one in x)
    for layer in model.watched():
        assert len(layer.seen) == forwards
    loss.backward()
    for layer in model.watched():
        assert len(layer.seen) == 2 * forwards
        again = layer.seen[forwards:]
        assert all(any(torch.equal(one, other) for other in again) for one in layer.seen[:forwards])
        assert not torch.equal(layer.seen[0], model.first.weight)
    assert at_rest(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not reentrant", "none"])
def test_gradients_with_checkpoints(reentrant):
    # What the backward pass knows of a weight is its noise: the logits' gradients follow from the noise that the forward pass saw and from
    # the gradient of the weight (but for the ends of the ranges, which get the ranges' gradient too).
    model = prepare(Blocks(reentrant), COARSE)
    for layer in model.watched():
        layer.register_full_backward_hook(lambda layer, grad_input, grad_output: None)
    model(torch.randn(5, 8)).square().sum().backward()
    for layer in model.watched():
        latent, quantizer = layer.parametrizations.weight.original.detach(), layer.parametrizations.weight[0]
        bits = quantizer.bits().double()
        slope = -(2**bits) / (2**bits - 1) * 0.6931471805599453 * (15 - bits) * (bits - 2) / 13
        noise = (layer.seen[0] - latent).double()
        grad = layer.parametrizations.weight.original.grad
        want = (grad.double() * noise).view(16, 4).sum(1) * slope
        ends = torch.zeros(8, 8, dtype=torch.bool)
        ends[torch.arange(8), latent.argmin(1)] = ends[torch.arange(8), latent.argmax(1)] = True
        whole = ~ends.view(16, 4).any(1)
        assert whole.any()
        torch.testing.assert_close(quantizer.logits.grad[whole].double(), want[whole], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_around_a_whole_model(reentrant):
    model, x = prepare(Blocks(None), COARSE), torch.randn(5, 8, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for layer in model.watched():
        first, second = layer.seen
        assert torch.equal(first, second)
    assert at_rest(model)
    assert all(p.grad is not None for p in model.parameters())


class Failing(nn.Module):
    def __init__(self, error=RuntimeError):
        super().__init__()
        self.a, self.b, self.error, self.fails = nn.Linear(6, 6), nn.Linear(6, 6), error, False

    def forward(self, x):
        x = self.a(x)
        if self.fails:
            raise self.error("on purpose")
        return self.b(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_exception_leaves_the_model_usable(training):
    model, x = prepare(Failing(), COARSE).train(training), torch.randn(2, 6)
    model.fails = True
    with pytest.raises(RuntimeError, match="on purpose"):
        model(x)
    assert at_rest(model)
    model.fails = False
    latent = model.a.parametrizations.weight.original
    with torch.no_grad():
        latent.add_(100)
    assert model.a.weight.min() > 50
    gradients(model, x)
    assert at_rest(model)
    assert latent.grad is not None


def test_an_interrupt_leaves_the_model_usable():
    model, x = prepare(Failing(KeyboardInterrupt), COARSE), torch.randn(2, 6)
    model.fails = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.fails = False
    with torch.no_grad():
        model.a.parametrizations.weight.original.add_(100)
    seen = []
    model.a.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.detach()))
    gradients(model, x)  # with noise and weights of now
    assert seen[0].min() > 50
    assert at_rest(model)


def test_an_exception_in_the_drawing_of_noise():
    model = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), COARSE)
    model[1].double()
    with pytest.raises(TypeError, match="got Double"):
        model(torch.randn(2, 6))
    assert at_rest(model)


def test_calling_a_submodule():
    model = prepare(Net(), COARSE)
    x = torch.randn(2, 5)
    assert not torch.equal(model.fc(x), model.fc(x))
    model.fc(x).sum().backward()
    assert model.fc.parametrizations.weight[0].logits.grad.any()
    assert model.conv.parametrizations.weight.original.grad is None
    assert at_rest(model)
    model.fc.eval()
    assert torch.equal(model.fc(x), model.fc(x))


def test_models_within_models():
    inner = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), COARSE)
    outer = prepare(nn.Sequential(inner, nn.Linear(6, 6)), {"1": COARSE})
    assert sum(begin_forward in m._forward_pre_hooks.values() for m in outer.modules()) == 2
    seen = []
    for layer in inner:
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer.weight.detach(), layer.weight.detach())))
    gradients(outer, torch.randn(3, 6))
    assert all(torch.equal(a, b) for a, b in seen)
    assert at_rest(outer)
    gradients(inner, torch.randn(3, 6))
    assert at_rest(outer)


def test_hooks_are_registered_once():
    model = prepare(Net(), {"conv": COARSE})
    prepare(model, {"fc": COARSE})
    assert list(model._forward_pre_hooks.values()) == [begin_forward]
    assert len(model._forward_hooks) == 1
    with pytest.raises(ValueError, match="must not be prepared already"):
        prepare(model, {"fc": COARSE})


def test_a_frozen_part_in_evaluation_mode():
    model = prepare(Net(), COARSE)
    model.conv.eval()
    x = images()
    frozen = model.conv.weight.detach()
    seen = []
    model.conv.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.detach()))
    y, grads = gradients(model, x)
    assert torch.equal(seen[0], frozen)
    assert not torch.equal(model(x), y)  # the rest has noise
    assert "conv.parametrizations.weight.0.logits" not in grads
    assert grads["conv.parametrizations.weight.original"].any()  # straight through
    assert weight_bits(model)["conv.weight"].unique().tolist() == [3.0]


@pytest.mark.parametrize("what", ["weights", "bits", "both"])
def test_frozen_parameters(what):
    model = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), COARSE)
    chain = model[0].parametrizations.weight
    chain.original.requires_grad_(what == "bits")
    chain[0].logits.requires_grad_(what == "weights")
    _, grads = gradients(model, torch.randn(3, 6))
    assert ("0.parametrizations.weight.original" in grads) == (what == "bits")
    assert ("0.parametrizations.weight.0.logits" in grads) == (what == "weights")
    assert grads["1.parametrizations.weight.original"].any()
    with torch.no_grad():
        model(torch.randn(3, 6))
    assert at_rest(model)


def test_a_layer_that_is_not_used_gets_no_gradient():
    class Skips(Failing):
        def forward(self, x):
            return self.a(x)

    model = prepare(Skips(), COARSE)
    _, grads = gradients(model, torch.randn(3, 6))
    assert {name.split(".")[0] for name in grads} == {"a"}


def test_constant_and_zero_weights_train():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[1].weight, 0.5)
    prepare(model, DiffQ())
    x = torch.randn(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = add_bit_parameters(optimizer, model)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    assert guard.skipped == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert model[1].weight.std() > 0


@pytest.mark.parametrize("when", ["fresh", "after a step"])
def test_deepcopy(when):
    model, x = prepare(Net(), COARSE), images()
    optimizer = torch.optim.Adam(model.parameters())
    add_bit_parameters(optimizer, model)
    if when == "after a step":
        gradients(model, x)
        optimizer.step()
    twin = copy.deepcopy(model)
    assert_same(gradients(twin, x), gradients(model, x))
    twin.fc.parametrizations.weight.original.data.zero_()
    twin.fc.parametrizations.weight[0].logits.data.fill_(5)
    assert model.fc.weight.abs().sum() > 0
    assert not twin.fc.weight.any()
    assert model.fc.parametrizations.weight[0].logits.max() < 5
    add_bit_parameters(torch.optim.Adam(twin.parameters()), twin)  # its bits are not in the other's optimizer
    assert torch.equal(size_penalty(copy.deepcopy(model)), size_penalty(model))


def test_state_dict():
    x, trained = images(), prepare(Net(), COARSE)
    for own in logits_of(trained):
        own.data.normal_()
    gradients(trained, x)
    state = trained.state_dict()
    assert sum(key.endswith("logits") for key in state) == 5
    other = prepare(Net(), COARSE)
    other(x)
    missing = other.load_state_dict(state)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert_same(gradients(other, x), gradients(trained, x))
    assert torch.equal(other.eval()(x), trained.eval()(x))
    meta = prepare(Net().to("meta"), COARSE)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta.eval()(x), trained.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepare(Net(), DiffQ(group_size=8)).load_state_dict(state)


def test_saving_a_whole_model(tmp_path):
    model, x = prepare(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), COARSE), images()
    model(x)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        torch.save(model, tmp_path / "model.pt")  # torch's own limit: state_dict is what it saves
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin = prepare(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), COARSE)
    twin.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(gradients(twin, x), gradients(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(dtype):
    x = images().to(dtype)
    for model in (prepare(Net().to(dtype), COARSE), prepare(Net(), COARSE).to(dtype)):  # the latter's logits are cast too
        y, grads = gradients(model, x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in grads.values())
        assert grads["fc.parametrizations.weight.0.logits"].dtype == model.fc.parametrizations.weight[0].logits.dtype
        assert weight_bits(model)["fc.weight"].dtype == torch.float32
        assert size_penalty(model).dtype == torch.float32
        model.eval()
        assert torch.equal(model(x), model(x))


def test_autocast():
    x, model = images(16), prepare(Net(), DiffQ(init_bits=6))
    exact = gradients(model, x)
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert model.fc.weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), exact[0], rtol=0.1, atol=0.05)
    for name in ("original", "0.logits"):
        name = f"fc.parametrizations.weight.{name}"
        got = dict(model.named_parameters())[name].grad
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), exact[1][name].flatten(), dim=0) > 0.97


@pytest.mark.parametrize("order", ["prepare, QModule", "QModule, prepare"])
def test_with_compressed_activations(order):
    x, activations, plain = images(16), ActivationConfig(bits=8, max_bits=8), prepare(Net(), COARSE)
    base = Net()
    model = QModule(prepare(base, COARSE), activations) if order == "prepare, QModule" else prepare(QModule(base, activations), COARSE)
    model.load_state_dict(plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {"conv", "depthwise", "fc"} <= model.layer_bits().keys()
    y, grads = gradients(model, x)
    assert at_rest(model)
    assert not torch.equal(model(x), y)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in grads.values())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(model(x), model(x))
    assert size_penalty(model).item() == pytest.approx(size_penalty(plain).item())


def test_compiles_in_one_graph():
    x, model = images(), prepare(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 2)), COARSE)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    y, grads = gradients(compiled, x)
    assert {name.removeprefix("_orig_mod.") for name in grads} == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in grads.values())
    assert not torch.equal(compiled(x), y)  # noise is drawn in the graph, not when it was made
    assert_same(gradients(compiled, x), (y, grads))
    assert torch.equal(compiled.eval()(x), model.eval()(x))


def test_channels_last():
    x, model = images(), prepare(Net(), COARSE)
    want = model.eval()(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)
    gradients(model.train(), x.to(memory_format=torch.channels_last))
    assert model.conv.parametrizations.weight.original.grad.isfinite().all()


def test_two_processes(gloo):
    folder = gloo(Path(__file__).with_name("diffq_processes.py"))
    (first, *counts), (second, *other_counts) = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert counts == other_counts == [3, 1]  # the overflow in one process skips the step of both
    for a, b in zip(first, second, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)
    assert all(g.any() for name, g in first[0].items() if name.endswith("logits"))
    assert all(p.isfinite().all() for p in first[-1].values())


def test_gaussian_noise_after_inference_and_tracing():
    # The table of quantiles is kept: not one that inference mode or a trace has made.
    diffq._kept_quantiles.cache_clear()
    model = prepare(nn.Sequential(nn.Linear(8, 8)), DiffQ(noise="gaussian"))
    x = torch.randn(2, 8)
    torch.export.export(model, (x,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(2, 8))
    with torch.inference_mode():
        model(x)
    y = model(x)
    assert type(y) is torch.Tensor
    y.sum().backward()


def test_replicas_of_data_parallel(monkeypatch):
    # On the CPU: what replicate() makes of a module, without its copies to devices.
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape", lambda ts, devices, detach=False: [[t.clone() for t in ts] for _ in devices]
    )
    monkeypatch.setattr(replicate, "_get_device_index", lambda *args: 0)
    model = prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), DiffQ())
    x = torch.randn(4, 64)
    sum(replica(x).sum() for replica in replicate.replicate(model, [0, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
