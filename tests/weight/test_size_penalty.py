"""The size as a function of learned bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffq_models import MIB, Attention, Cell, First, Net, Tied, gradients, images, logits_of, quantizers
from torch import nn

import quantize
from quantize import DiffQ, add_bit_parameters, prepare, size_penalty, size_report, weight_bits


def spread_out(model, deviation=2.0):
    """Bits all over their bounds."""
    for own in logits_of(model):
        own.data.normal_(std=deviation)
    return model


def bytes_of_codes(model, rounded):
    """float64: of all groups, the last of which may be short."""
    total = 0.0
    for q in quantizers(model):
        bits = q.config.min_bits + (q.config.max_bits - q.config.min_bits) * q.logits.double().sigmoid()
        if rounded:
            bits = bits + (bits.detach().round() - bits.detach())
        total = total + bits.repeat_interleave(q.group_size)[: q.numel].sum() / 8
    return total


def other_bytes_of_linear(model):
    """Bytes of a Linear's file beside codes: half a byte a group for its bits, a range a channel and the bias."""
    q = quantizers(model)[0]
    return -(-q.logits.numel() // 2) + 8 * q.channels + 4 * model.bias.numel()


@pytest.mark.parametrize("numel", [(64, 32), (7, 9)])
def test_size_is_the_sum_by_hand(numel):
    model = spread_out(prepare(nn.Linear(*numel), DiffQ(group_size=8)))
    want = (bytes_of_codes(model, False) + other_bytes_of_linear(model)) / MIB
    size = size_penalty(model)
    assert (size.shape, size.dtype) == ((), torch.float32)
    assert size.item() == pytest.approx(want.item(), rel=1e-6)
    got = torch.autograd.grad(size, logits_of(model))
    for a, b in zip(got, torch.autograd.grad(want, logits_of(model)), strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-4, atol=0)
    rounded = size_penalty(model.eval())
    want = (bytes_of_codes(model, True) + other_bytes_of_linear(model)) / MIB
    assert rounded.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(rounded, logits_of(model)), torch.autograd.grad(want, logits_of(model)), strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-4, atol=0)  # straight through


MODELS = {
    "net": Net,
    "tied": Tied,
    "linear": lambda: nn.Linear(33, 7),
    "LSTM": lambda: First(nn.LSTM(5, 4, num_layers=2)),
    "GRUCell": lambda: Cell(nn.GRUCell),
    "attention": Attention,
    "conv and norm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)),
    "some not prepared": lambda: nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8)),
}


@pytest.mark.parametrize("span", ["channel", "tensor", "group"])
@pytest.mark.parametrize("group_size", [3, 8, 0])
@pytest.mark.parametrize("name", MODELS)
def test_size_is_that_of_the_file(name, group_size, span):
    model = spread_out(prepare(MODELS[name](), DiffQ(group_size=group_size, range=span, init_bits=5)), 1.0).eval()
    got, want = size_penalty(model).item() * MIB, size_report(model).bytes
    assert abs(got - want) <= len(quantizers(model)), (got, want)


def test_size_is_that_of_the_saved_file(tmp_path):
    model = spread_out(prepare(Net(), DiffQ()), 1.0).eval()
    packed = quantize.convert(model)
    quantize.save(packed, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    written = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert abs(written - size_penalty(model).item() * MIB) <= len(quantizers(model)) + 64  # alignment of the file's tensors
    x = images()
    torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_size_takes_no_time_the_second_time(monkeypatch):
    model = prepare(Net(), DiffQ())
    first = size_penalty(model)

    def refuse(model):
        raise AssertionError("converted again")

    monkeypatch.setattr("quantize.packed.size_report.bytes_beside_learned_bits", refuse)
    assert torch.equal(size_penalty(model), first)
    model.eval()
    size_penalty(model)


def test_size_leaves_the_model_alone():
    model, x = prepare(Net(), DiffQ()), images()
    model.norm.eval()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    size_penalty(model)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in (model, model.norm, model.fc)] == [True, False, True]
    gradients(model, x)


@pytest.mark.parametrize("first", [True, False], ids=["at the first call", "later"])
def test_size_never_raises_because_of_values(first):
    model = prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), DiffQ(group_size=8))
    if not first:
        size_penalty(model)
    own = logits_of(model)[0]
    with torch.no_grad():
        own[3] = torch.nan
        model[1].parametrizations.weight.original[2, 2] = torch.inf
        model[1].bias[0] = torch.nan
    size = size_penalty(model)
    assert size.isfinite()
    size.backward()
    assert own.grad[3] == 0
    assert own.grad[[0, 1, 2, 4]].all()
    top = copy.deepcopy(model)
    logits_of(top)[0].data[3] = 60.0
    assert torch.equal(size_penalty(top), size)
    assert size_penalty(model, target_size=1.0).isfinite()


def test_errors_of_size_penalty():
    model = prepare(nn.Linear(256, 64, bias=False), DiffQ(group_size=8, min_bits=2.5, max_bits=6, init_bits=4))
    with pytest.raises(TypeError, match="size_penalty: model must be an nn.Module; got int"):
        size_penalty(3)
    with pytest.raises(ValueError, match="size_penalty: model must have learned bits"):
        size_penalty(Net())
    for wrong in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="target_size must be a number of MiB; got"):
            size_penalty(model, wrong)
    least = (256 * 64 * 3 / 8 + 1024 + 512) / MIB  # 3 is the lowest whole number of bits; half a byte a group; a range a channel
    for wrong in (least - 1e-4, 0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"target_size must be at least {least:.4f} MiB, the size with min_bits everywhere; got"):
            size_penalty(model, wrong)
    assert size_penalty(model, least * (1 + 1e-9)).isfinite()


def test_the_penalty_for_missing_a_target():
    model = spread_out(prepare(nn.Linear(256, 64), DiffQ()), 1.0)
    size = size_penalty(model.eval()).item()
    model.train()
    assert size_penalty(model, size).item() == pytest.approx(0, abs=1e-6)
    for factor in (0.5, 0.9, 1.2, 3.0):
        missed = abs(1 / factor - 1)
        penalty = size_penalty(model, size * factor)
        assert penalty.item() == pytest.approx(missed, abs=0.0051)
        (grad, *_) = torch.autograd.grad(penalty, logits_of(model))
        assert bool(((grad > 0) == (factor < 1)).all())
    assert size_penalty(model, size * 1.002).item() < 0.0003  # quadratic near by


@pytest.mark.parametrize("part", [0.4, 0.55, 1.4])
def test_the_penalty_alone_reaches_its_target(part):
    torch.manual_seed(2)
    model = spread_out(prepare(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64)), DiffQ(init_bits=6)), 0.5)
    target = part * size_penalty(model.eval()).item()
    model.train()
    optimizer = torch.optim.Adam([{"params": []}])
    add_bit_parameters(optimizer, model, lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (10 * size_penalty(model, target)).backward()
        optimizer.step()
    assert size_penalty(model.eval()).item() == pytest.approx(target, rel=0.01)
    assert size_report(model).bytes / MIB == pytest.approx(target, rel=0.01)


def test_training_with_a_target():
    # Weights and bits together: the loss falls and the file is as large as was asked for.
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    model = prepare(copy.deepcopy(teacher), DiffQ(group_size=16))
    x = torch.randn(256, 16)
    target, size = teacher(x).detach(), 0.7 * size_penalty(model).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = add_bit_parameters(optimizer, model, lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (F.mse_loss(model(x), target) + 10 * size_penalty(model, size)).backward()
        optimizer.step()
    assert guard.skipped == 0
    assert size_report(model.eval()).bytes / MIB == pytest.approx(size, rel=0.01)
    assert F.mse_loss(model(x), target) < 0.05 * target.var()
    bits = torch.cat(list(weight_bits(model).values()))
    assert bits.unique().numel() > 1  # not all alike: the bits were learned


def test_walks_find_what_python_finds():
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(4)])
    model.append(model[1])
    model.add_module("none", None)
    model[2][0].weight = model[3][0].weight
    for kind in (nn.Module, nn.Conv2d, nn.modules.batchnorm._BatchNorm):
        want = [m for m in model.modules() if isinstance(m, kind)]
        assert all(a is b for a, b in zip(quantize._C.modules_of(model, kind), want, strict=True))
    assert quantize._C.held_bytes(model) == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_bits_are_counted_with_the_noise_where_that_is_up_to_date():
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 5)), quantize.DiffQ(4))
    logits = [layer.parametrizations.weight[0].logits for layer in model]

    def fresh():
        return quantize.size_penalty(copy.deepcopy(model))  # a copy has drawn nothing

    def gradients(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)

    want = fresh()
    slopes = gradients(quantize.size_penalty(model))
    loss = model(torch.randn(3, 16)).square().sum()
    penalty = quantize.size_penalty(model)
    torch.testing.assert_close(penalty, want)
    for both, one, other in zip(gradients(loss + penalty), gradients(loss), slopes, strict=True):
        torch.testing.assert_close(both, one + other)
    loss.backward()  # each may have a backward of its own, in any order
    quantize.size_penalty(model).backward()
    for own, slope in zip(logits, slopes, strict=True):
        assert own.grad is not None
        assert not torch.equal(own.grad, slope)
    with torch.no_grad():
        logits[0].add_(1)
        assert not quantize.size_penalty(model).requires_grad
    torch.testing.assert_close(quantize.size_penalty(model), fresh())
    assert quantize.size_penalty(model).item() > want.item()
    model(torch.randn(3, 16))
    model.eval()
    torch.testing.assert_close(quantize.size_penalty(model), fresh())
    with torch.no_grad():
        model.train()(torch.randn(3, 16))
    assert quantize.size_penalty(model).requires_grad


def test_a_penalty_s_own_backward_leaves_the_weights_alone():
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 8)), quantize.DiffQ(4))
    weight, seen = model[0].parametrizations.weight.original, []
    weight.register_hook(seen.append)
    model(torch.randn(3, 16)).sum().backward()
    quantize.size_penalty(model).backward()
    assert len(seen) == 1 and seen[0] is not None


def test_changes_that_count_no_versions_are_seen_in_evaluation():
    model = quantize.prepare(nn.Sequential(nn.Linear(64, 64)), quantize.DiffQ())
    model(torch.randn(2, 64))
    for p in model.parameters():
        p.data.copy_(p.data - 3)  # as averages of weights are put in place
    model.eval()
    assert abs(float(quantize.size_penalty(model)) * MIB - quantize.size_report(model).bytes) <= 1
    model.train()(torch.randn(2, 64))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach() + 3, model.parameters())
    torch.testing.assert_close(quantize.size_penalty(model), quantize.size_penalty(copy.deepcopy(model)))
    model.double()
    quantize.size_penalty(model).backward()
