"""Prepared models in training: with compressed activations, DistributedDataParallel, autocast, copies, checkpoints and torch.compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_prepare import Net, images
from torch import nn

import quantize
from quantize import ActivationConfig, PowerOfTwo, QModule, Uniform, prepare

EIGHT = ActivationConfig(bits=8, max_bits=8)
BOTH = [PowerOfTwo(4), Uniform(4, activation_bits=8)]
ORDERS = {
    "prepare, QModule": lambda m, config, activations: QModule(prepare(m, config), activations),
    "QModule, prepare": lambda m, config, activations: prepare(QModule(m, activations), config),
}


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], **tolerance)


def settled(model, x):
    """With activation quantizers that have seen their first input."""
    with torch.no_grad():
        model.eval()(x)
    return model.train()


# ------------------------------------------------------------------------------------------------------------- compressed activations


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_with_compressed_activations(order, config):
    x = images(16)
    plain = settled(prepare(Net(), config), x)
    model = ORDERS[order](Net(), config, EIGHT)
    model.load_state_dict(plain.state_dict())
    assert isinstance(model, QModule)
    assert list(model.state_dict()) == list(plain.state_dict())
    exact, ours = gradients(plain, x), gradients(model, x)
    assert torch.equal(ours[0], exact[0])
    assert ours[1].keys() == exact[1].keys()
    names = [name for name in exact[1] if name != "conv.bias"]  # whose gradient is zero but for rounding: a batch norm follows
    got, want = (torch.cat([g[1][name].flatten() for name in names]) for g in (ours, exact))
    assert F.cosine_similarity(got, want, dim=0) > 0.999
    assert {"conv", "body.0", "body.2", "fc"} <= model.layer_bits().keys()


@pytest.mark.parametrize("order", ORDERS)
def test_compressed_activations_are_reported_and_saved(order):
    x = torch.randn(32, 16, 16, 16)
    layers = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)]
    model = ORDERS[order](nn.Sequential(*layers), PowerOfTwo(4), ActivationConfig(bits=2, max_bits=2))
    report = quantize.memory_report(model, x)
    assert report.ratio > 5
    assert {row.name for row in report.layers} >= {"0", "1", "2", "3"}


@pytest.mark.parametrize("order", ORDERS)
def test_training_steps_and_copies(order):
    torch.manual_seed(1)  # one seed in thirty starts where these few steps gain nothing
    model = ORDERS[order](Net(), Uniform(4, activation_bits=8), ActivationConfig(bits=4))
    x = images(16)
    gradients(model, x)
    optimizer, target, losses = torch.optim.Adam(model.parameters(), lr=0.03), torch.randint(5, (16,)), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_distributed_data_parallel(process_group, config):
    x = images()
    model = prepare(Net(), config)
    alone = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    gradients(parallel, x)  # the first forward decides where activations' grids start
    gradients(alone, x)
    got, want = gradients(parallel, x), gradients(alone, x)
    assert_same((got[0], {name.removeprefix("module."): g for name, g in got[1].items()}), want)
    with pytest.raises(ValueError, match="before it is wrapped in DistributedDataParallel"):
        prepare(parallel, config)


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_autocast(config):
    x = images(16)
    model = settled(prepare(Net(), config), x)
    exact = gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32  # a product with an fp32 parameter; the layers' outputs are bf16
    model.zero_grad()
    y.square().sum().backward()
    assert model.fc.parametrizations.weight.original.grad.dtype == torch.float32
    torch.testing.assert_close(y, exact[0], rtol=0.1, atol=0.05)
    got = model.fc.parametrizations.weight.original.grad.flatten()
    assert F.cosine_similarity(got, exact[1]["fc.parametrizations.weight.original"].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(dtype):
    model = prepare(Net().to(dtype), Uniform(4, activation_bits=8))
    y, grads = gradients(model, images().to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert {g.dtype for name, g in grads.items() if not name.endswith("step")} == {dtype}


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_compiles_in_one_graph(config):
    x = images()
    model = settled(prepare(Net(), config), x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got, want = gradients(compiled, x), gradients(model, x)
    assert_same((got[0], {name.removeprefix("_orig_mod."): g for name, g in got[1].items()}), want)


def test_channels_last():
    x = images()
    model = prepare(Net(), PowerOfTwo(4))
    exact = gradients(model, x)
    model.to(memory_format=torch.channels_last)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(gradients(model, x.to(memory_format=torch.channels_last)), exact, rtol=1e-4, atol=1e-4)


def test_a_seed_makes_training_repeatable():
    def trained():
        torch.manual_seed(3)
        model = prepare(Net(), Uniform(3, activation_bits=4))
        settled(model, x := images(16))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[key], second[key]) for key in first)


SMALL = [Uniform(2), Uniform(3, 3), PowerOfTwo(3), PowerOfTwo(3, plus=False), PowerOfTwo(2, activation_bits=4)]


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_training_lowers_the_loss(config):
    # A teacher of the same shape in full precision: training the student's latent weights beats rounding them once.
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    student = prepare(copy.deepcopy(teacher), config)
    x = torch.randn(256, 16)
    target = teacher(x).detach()
    settled(student, x)
    optimizer, losses, steps = torch.optim.Adam(student.parameters(), lr=1e-3), [], 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)  # weights between two levels go on jumping otherwise
        optimizer.zero_grad()
        loss = F.mse_loss(student(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------------------------- copies, checkpoints


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_deepcopy(config):
    x = images()
    model = settled(prepare(Net(), config), x)
    twin = copy.deepcopy(model)
    assert_same(gradients(twin, x), gradients(model, x))
    twin.fc.parametrizations.weight.original.data.zero_()
    assert model.fc.weight.abs().sum() > 0
    assert not twin.fc.weight.any()
    assert quantize.weight_bits(twin) == quantize.weight_bits(model)


@pytest.mark.parametrize("config", BOTH, ids=str)
def test_state_dict(config):
    x = images()
    model = settled(prepare(Net(), config), x)
    other = prepare(Net(), config)
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert torch.equal(other.eval()(x), model.eval()(x))
    meta = prepare(Net().to("meta"), config)
    meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(meta.eval()(x), model.eval()(x))


def test_moving_and_casting():
    model = prepare(Net(), Uniform(4, activation_bits=8))
    model.to(torch.bfloat16)
    assert model.conv.weight.dtype == torch.bfloat16
    model.float()
    assert gradients(model, images())[0].dtype == torch.float32
    model.to("meta")
    assert model.conv.weight.is_meta


def test_transformer_encoders_take_padded_inputs():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    prepare(model, Uniform(8, activation_bits=8))
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False, False, False, True], [False, False, True, True]])
    model(x)
    with torch.no_grad():
        y = model.eval()(x, src_key_padding_mask=padding)
    want = model.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], want[~padding])
