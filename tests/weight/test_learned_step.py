"""Weights with a learned step, from where it starts to the file: against a twin in PyTorch, whose gradients autograd finds."""

import copy
import math

import pytest
import torch
from torch import nn

import quantize
from quantize import PowerOfTwo, Uniform
from quantize.weight.quantizer import LearnedStepQuantizer, make_quantizer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def learned(bits=4, activation_bits=None):
    return Uniform(bits, activation_bits, scale="learned")


def twin(w, step, bits):
    """LSQ (arXiv 1902.08153, appendix A) with the levels -L .. L."""
    largest = 2 ** (bits - 1) - 1
    step = step.detach() + (step - step.detach()) / math.sqrt(w.numel() * largest)  # scales the gradient
    v = (w.float() * (1 / step)).clamp(-largest, largest)
    return ((v + (v.round() - v).detach()) * step).to(w.dtype)


def network(config=None):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Flatten(), nn.Linear(196, 5)
    )
    return quantize.prepare(model, config or learned())


def steps(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".step")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_as_twin(each_isa, bits, dtype):
    for shape in ((1, 1), (3, 7), (16, 3, 3, 3), (65, 151)):
        w, grad = (torch.randn(shape) * 0.3).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
        quantizer = make_quantizer(learned(bits), w)
        step = quantizer.step.detach().mul_(0.7).requires_grad_()  # so that a few weights lie outside; quantizer.step itself
        ours, want = quantizer(w), twin(w, step, bits)
        assert torch.equal(ours, want)
        (got_w, got_step), (want_w, want_step) = (torch.autograd.grad(y, (w, s), grad) for y, s in ((ours, quantizer.step), (want, step)))
        torch.testing.assert_close(got_w, want_w, rtol=1e-6, atol=0)  # the twin multiplies by the step and by its inverse
        magnitude = float(grad.float().abs().sum()) * 2**bits / math.sqrt(w.numel() * (2 ** (bits - 1) - 1))
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]  # the twin rounds its products to `dtype`
        torch.testing.assert_close(got_step, want_step, rtol=0, atol=tolerance * magnitude)


# ------------------------------------------------------------------------------------------------------------- where it starts


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_starts_from_mean_and_deviation(bits):
    for w in (torch.randn(64, 33), torch.randn(64, 33) * 0.01 + 5, torch.randn(64, 33) - 1):
        mean, std = float(w.mean()), float(w.std(correction=0))
        want = max(abs(mean - 3 * std), abs(mean + 3 * std)) / 2 ** (bits - 1)
        assert make_quantizer(learned(bits), w).step.item() == pytest.approx(want, rel=1e-5)


EDGES = {
    "zeros": torch.zeros(3, 4),
    "constant": torch.full((3, 4), 0.5),
    "negative": torch.full((3, 4), -0.5),
    "one": torch.tensor([[2.0]]),
    "tiny": torch.full((3, 4), 1e-40),
    "huge": torch.tensor([[3e37, -3e37]]),
    "one of many": torch.eye(12),
}


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", EDGES)
def test_few_values(name, bits):
    w = EDGES[name].clone().requires_grad_()
    quantizer = make_quantizer(learned(bits), w)
    y = quantizer(w)
    assert quantizer.step > 0
    assert quantizer.step.isfinite()
    assert y.isfinite().all()
    assert (y * w >= 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (w, quantizer.step)))
    if name in ("constant", "negative", "one"):  # the last level
        torch.testing.assert_close(y, w * (1 - 2.0 ** (1 - bits)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision(dtype):
    model = nn.Linear(8, 4).to(dtype)
    want = make_quantizer(learned(), model.weight.float()).step
    quantize.prepare(model, learned())
    quantizer = model.parametrizations.weight[0]
    assert quantizer.step.dtype == torch.float32
    assert torch.equal(quantizer.step, want)
    assert model.weight.dtype == dtype
    model(torch.randn(3, 8, dtype=dtype)).sum().backward()
    assert quantizer.step.grad.isfinite()
    later = quantize.prepare(nn.Linear(8, 4), learned()).to(dtype)  # takes the step along
    later(torch.randn(3, 8, dtype=dtype)).sum().backward()
    assert later.parametrizations.weight[0].step.grad.isfinite()


def test_meta_device():
    model = quantize.prepare(nn.Linear(8, 4, device="meta"), learned())
    assert model.weight.shape == (4, 8)
    model = model.to_empty(device="cpu")
    model.load_state_dict(quantize.prepare(nn.Linear(8, 4), learned()).state_dict())
    assert model(torch.randn(3, 8)).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- in a model


def test_one_step_a_layer_trained_by_an_optimizer_made_after_prepare():
    model = network()
    assert [type(m) for m in model.modules() if isinstance(m, LearnedStepQuantizer)] == [LearnedStepQuantizer] * 3
    assert {name: p.shape for name, p in steps(model).items()} == {f"{i}.parametrizations.weight.0.step": () for i in (0, 3, 5)}
    assert quantize.weight_bits(model) == {f"{i}.weight": 4 for i in (0, 3, 5)}
    assert model[5].weight.unique().numel() <= 15
    before = {name: p.item() for name, p in steps(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(6, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert all(p.item() != before[name] for name, p in steps(model).items())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_lowers_the_loss(bits):
    x = torch.randn(256, 16)
    y = x @ torch.randn(16, 4)
    losses = {}
    for what in ("both", "weights alone"):
        torch.manual_seed(2)
        model = quantize.prepare(nn.Linear(16, 4), learned(bits))
        step = model.parametrizations.weight[0].step.requires_grad_(what == "both")
        start = step.item()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses[what] = []
        for _ in range(200):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses[what].append(loss.item())
        assert (step.item() != start) == (what == "both")
    assert losses["both"][-1] < 0.5 * losses["both"][0]
    assert losses["both"][-1] < 0.5 * losses["weights alone"][-1]  # the weights have outgrown the grid they started with


def test_deepcopy_and_state_dict():
    model = network()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in steps(model).values():
            p.mul_(1.5)
    assert not torch.equal(other[5].weight, model[5].weight)
    other.load_state_dict(model.state_dict())
    for i in (0, 3, 5):
        assert torch.equal(other[i].weight, model[i].weight)


def test_tied_weights_share_the_step_and_are_packed_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    quantize.prepare(model, learned())
    assert len(steps(model)) == 1
    with torch.no_grad():
        model[1].parametrizations.weight[0].step.mul_(2)
    packed = quantize.convert(model)
    assert packed[0].codes is packed[1].codes
    for i in (0, 1):
        assert torch.equal(packed[i].decoded(), model[i].weight)


def test_a_tied_weight_that_was_prepared_apart_is_packed_as_each_has_it():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    quantize.prepare(model, learned())
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    packed = quantize.convert(model)
    assert (model[0].weight != model[1].weight).any()
    for i in (0, 1):
        assert torch.equal(packed[i].decoded(), model[i].weight)


# ------------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_convert_packs_what_evaluation_uses(bits, dtype):
    layers = [nn.Linear(24, 5), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv1d(4, 6, 3)]
    for layer, shape in zip(layers, [(3, 24), (3, 4, 6, 6), (3, 4, 6, 6), (3, 4, 9)], strict=True):
        model = quantize.prepare(layer.to(dtype), learned(bits)).eval()
        with torch.no_grad():
            step = model.parametrizations.weight[0].step.mul_(0.6)
            packed = quantize.convert(model)
            assert torch.equal(packed.decoded().to(dtype), model.weight)
            assert (packed.scales == step).all()
            x = torch.randn(shape, dtype=dtype)
            torch.testing.assert_close(
                packed(x), model(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5
            )


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_step_that_is_not_positive_packs_as_it_evaluates(step):
    model = quantize.prepare(nn.Linear(24, 5), learned())
    with torch.no_grad():
        model.parametrizations.weight[0].step.fill_(step)
        assert torch.equal(quantize.convert(model).decoded(), model.weight)


def test_files_and_reports(tmp_path):
    model = network(learned(4, activation_bits=8))
    x = torch.randn(6, 3, 8, 8)
    model(x)
    packed = quantize.convert(model)
    quantize.save(packed, tmp_path / "a")
    loaded = quantize.load(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, groups=2),
            nn.Flatten(),
            nn.Linear(196, 5),
        ),
        tmp_path / "a",
    )
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
        torch.testing.assert_close(packed(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert quantize.size_report(model).bytes == quantize.size_report(packed).bytes
    plain = network(Uniform(4, 8))
    assert quantize.size_report(model).bytes == quantize.size_report(plain).bytes
    assert quantize.size_report(model).float_bytes == quantize.size_report(plain).float_bytes


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(4, scale="lsq"), "Uniform: scale must be one of 'least_squares', 'max', 'learned'; got 'lsq'"),
        (lambda: Uniform(4, scale=None), "Uniform: scale must be one of 'least_squares', 'max', 'learned'; got None"),
        (lambda: PowerOfTwo(4, scale="learned"), "PowerOfTwo: scale must be one of 'least_squares', 'max'; got 'learned'"),
    ],
)
def test_errors_of_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_not_packed(bad):
    model = network()
    with torch.no_grad():
        model[5].parametrizations.weight[0].step.fill_(bad)
    assert model[5].weight.isnan().all()
    with pytest.raises(ValueError, match=f"the learned step must be finite; got {bad}"):
        quantize.convert(model)
