"""Bits that adapt: per sample, between layers, by gradient. What is asked for is what is used."""

import pytest
import torch
from adaptive_models import batch, bits_in_use, network, step
from torch import nn

import quantize
from quantize import ActivationConfig, QModule


def packed(model, x):
    """(bytes of codes, elements) of all packings of one forward."""
    sizes = []
    handles = [m.register_forward_pre_hook(lambda m, a: sizes.append(a[0].numel())) for m in model.modules() if getattr(m, "lossy", False)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    for handle in handles:
        handle.remove()
    numbers = {t.data_ptr(): t for t in saved if t.dtype == torch.uint8 and t.numel() > 64}
    masks = sum(-(-s // 8) for s in (8 * 256 * len(x), 16 * 49 * len(x), 64 * len(x)))
    return sum(t.nbytes for t in numbers.values()) - masks, sum(sizes)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("bits", [1, 1.5, 2, 3, 4, 6.5])
def test_bytes_asked_for_are_bytes_used(bits, per_layer):
    model = QModule(network(), ActivationConfig(bits=bits, per_layer=per_layer, group_size=64))
    x, target = batch(64)
    for _ in range(13):
        step(model, x, target)
    code_bytes, elements = packed(model, x)
    assert 8 * code_bytes / elements == pytest.approx(bits, rel=0.02)
    used = bits_in_use(model)
    counts = {"0": 3 * 256, "1": 8 * 256, "3": 8 * 256, "4": 16 * 49, "8": 256, "10": 64}
    assert sum(float(used[n].float().mean()) * c for n, c in counts.items()) / sum(counts.values()) == pytest.approx(bits, rel=0.02)
    if not per_layer:
        assert all(float(u.float().mean()) == pytest.approx(bits, rel=0.05) for u in used.values())


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [1.25, 2, 2.5, 3])
def test_few_samples_too(bits, samples, per_layer):
    # Twelve layers round to what whole bits allow, some up and some down: off by half the widest step, from 4 to 8, of one sample in one.
    model = QModule(nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)]), ActivationConfig(bits=bits, per_layer=per_layer))
    x = torch.randn(samples, 64)
    for _ in range(15):
        model(x).square().sum().backward()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    kept = sum(t.nbytes for t in saved if t.dtype == torch.uint8 and t.numel() > samples)
    assert 8 * kept / (12 * 64 * samples) == pytest.approx(bits, abs=2.001 / (12 * samples) if per_layer else 0.001)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (ActivationConfig(bits=2, per_layer=False), 3),
        (ActivationConfig(bits=2, per_layer=False, use_gradient=True), 5),
        (ActivationConfig(bits=2), 12),
    ],
    ids=["per sample", "by gradient", "between layers"],
)
def test_bits_settle(config, steps):
    # At fixed weights and one batch nothing but the noise of the measured sensitivities moves them. Null: it does not, except that two of
    # the 32 samples trade bits, 4 for 2 at most, where sensitivities are used: of 24 runs with other seeds in one.
    model = QModule(network(), config)
    x, target = batch()
    seen = []
    for _ in range(steps + 6):
        if config.use_gradient:
            model.set_sample_indices(torch.arange(len(x)))
        step(model, x, target)
        seen.append({n: u.float() for n, u in bits_in_use(model).items()})
    for later in seen[steps:]:
        for name, at_last in seen[-1].items():
            assert float((later[name] - at_last).abs().mean()) <= (0 if steps == 3 else 4 / 32)
            assert later[name].sum() == at_last.sum()


def test_bits_go_where_the_variance_is():
    model = QModule(nn.Sequential(nn.Linear(256, 8)), ActivationConfig(bits=2, per_layer=False))
    x = torch.randn(32, 256) * torch.logspace(-1, 1, 32)[:, None]
    model(x).sum().backward()
    used = bits_in_use(model)["0"]
    assert (used[1:] >= used[:-1]).all()
    assert set(used.tolist()) >= {1, 4}
    assert int(used.sum()) <= 64
    variance = torch.ops.quantize.group_variance(x, 256)
    chosen = variance.gather(1, used.long().log2().long()[:, None]).sum()
    assert chosen < 0.3 * variance[:, 1].sum()


@pytest.mark.parametrize("most", [2, 4, 8])
def test_max_bits(most):
    model = QModule(nn.Sequential(nn.Linear(256, 8)), ActivationConfig(bits=1.5, max_bits=most))
    x = torch.randn(32, 256) * torch.logspace(-8, 8, 32)[:, None]
    for _ in range(3):
        model(x).sum().backward()
    assert int(bits_in_use(model)["0"].max()) == most


def test_bits_move_to_the_layer_that_matters():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(256, 8), nn.Linear(256, 8)

        def forward(self, x):
            return 10 * self.loud(x).sum(1) + 0.1 * self.quiet(x.flip(1)).sum(1)

    model = QModule(Two(), ActivationConfig(bits=3))
    for _ in range(12):
        model(torch.randn(16, 256)).square().sum().backward()
    bits = model.layer_bits()
    assert bits["loud"] > 4
    assert bits["quiet"] < 2
    assert sum(bits.values()) / 2 == pytest.approx(3, rel=0.02)
    alone = QModule(Two(), ActivationConfig(bits=3, per_layer=False))
    for _ in range(12):
        alone(torch.randn(16, 256)).square().sum().backward()
    assert all(value == pytest.approx(3, rel=0.05) for value in alone.layer_bits().values())


def test_layer_bits_have_plain_names():
    model = QModule(network(), ActivationConfig(bits=2))
    expected = ["0", "1", "3", "4", "8", "10"]
    assert model.layer_bits() == dict.fromkeys(expected, 2.0)
    step(model, *batch())
    assert list(model.layer_bits()) == expected
    assert all(isinstance(v, float) for v in model.layer_bits().values())


# ---------------------------------------------------------------------------------------------------------------- by gradient


def test_bits_follow_the_gradient_of_the_last_visit():
    model = QModule(nn.Sequential(nn.Linear(256, 4)), ActivationConfig(bits=2, per_layer=False, use_gradient=True))
    x, target = torch.randn(32, 256), torch.arange(32) % 4
    weight = torch.ones(32)
    weight[::4] = 30.0
    order = torch.randperm(32)
    for visit in range(3):
        shuffled = order.roll(visit)
        model.set_sample_indices(shuffled + 100)
        step(model, x[shuffled], target[shuffled], weight[shuffled])
    used = torch.empty(32)
    used[shuffled] = bits_in_use(model)["0"].float()
    assert used[::4].mean() > used.view(8, 4)[:, 1:].mean() + 1
    # Without indices the gradients say nothing.
    step(model, x, target, weight)
    plain = bits_in_use(model)["0"].float()
    assert abs(plain[::4].mean() - plain.view(8, 4)[:, 1:].mean()) < 1


def test_unseen_samples_and_uneven_batches():
    model = QModule(network(), ActivationConfig(bits=2, use_gradient=True))
    for indices in (range(8), range(4, 12), [1000], range(3), []):
        x, target = batch(max(len(indices), 1))
        x, target = x[: len(indices)], target[: len(indices)]
        model.set_sample_indices(torch.tensor(list(indices), dtype=torch.int32))
        if len(indices) > 1:
            step(model, x, target)
        else:
            model.eval()
            model(x).sum().backward()
            model.train()
    assert set(model.layer_bits()) == {"0", "1", "3", "4", "8", "10"}


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 1], TypeError, "set_sample_indices: indices must be an int64 or int32 Tensor; got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "indices must be an int64 or int32 Tensor; got torch.float32"),
        (torch.tensor([True]), TypeError, "indices must be an int64 or int32 Tensor; got torch.bool"),
        (torch.tensor([[0, 1]]), ValueError, r"indices must be Tensor\[N\].*got shape \[1, 2\]"),
        (torch.tensor(3), ValueError, r"indices must be Tensor\[N\]"),
        (torch.tensor([-1, 2]), ValueError, "numbers from 0"),
    ],
)
def test_bad_indices_are_named(indices, error, message):
    with pytest.raises(error, match=message):
        QModule(network(), ActivationConfig(use_gradient=True)).set_sample_indices(indices)


# ---------------------------------------------------------------------------------------------------------------- sharing


def test_layers_by_hand_adapt_per_sample():
    layer = quantize.QLinear(256, 8)
    x = torch.randn(32, 256) * torch.logspace(-1, 1, 32)[:, None]
    layer(x).sum().backward()
    used = layer._state.used
    assert used[-1] > used[0]
    assert int(used.sum()) <= 64
