"""Where the grids of activations start: from the first tensor, by calibration, in two processes, from a checkpoint."""

import copy

import lsq_processes as processes
import pytest
import torch
from torch import nn

import quantize
from quantize.weight import lsq
from quantize.weight.lsq import METHODS, ActivationQuantizer, Observer


def started(x, bits=4):
    quantizer = ActivationQuantizer(bits)
    return quantizer, quantizer(x)


def relative_error(y, x):
    return float((y.detach() - x).double().square().sum() / x.double().square().sum())


# ------------------------------------------------------------------------------------------------------------- the first tensor


@pytest.mark.parametrize("bits", range(2, 9))
def test_starts_near_the_best_step(bits):
    # The smallest error over many steps, found by trying them, is met within 5 %.
    for x, zero_point in ((torch.randn(4, 2500), None), (torch.randn(4, 2500).relu(), 0), (-torch.rand(4, 2500), 2**bits - 1)):
        quantizer, y = started(x, bits)
        assert quantizer.initialized
        assert quantizer.seen
        if zero_point is not None:
            assert quantizer.zero_point == zero_point
        span = float(x.max() - x.min()) / quantizer.levels
        steps = [torch.tensor(span * part / 100) for part in range(4, 101)]
        errors = [relative_error(torch.ops.quantize.lsq_quantize(x, s, quantizer.zero_point, 2**bits - 1), x) for s in steps]
        assert relative_error(y, x) <= 1.05 * min(errors) + 1e-6
    quantizer, _ = started(torch.cat([x := torch.randn(5000), -x]), bits)
    assert quantizer.zero_point in (2 ** (bits - 1) - 1, 2 ** (bits - 1))


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.full((3, 4), 5.0), torch.full((3, 4), -0.1), torch.eye(4), torch.tensor(2.0)])
def test_few_values(x):
    quantizer, y = started(x)
    assert y.isfinite().all()
    assert quantizer.step > 0
    torch.testing.assert_close(y, x, rtol=0.01, atol=0)  # ends of the grid, or zero
    assert ((y == 0) == (x == 0)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = torch.randn(4, 500)
    quantizer, y = started(x.to(dtype))
    assert y.dtype == dtype
    assert quantizer.step.dtype == torch.float32
    assert quantizer.step.item() == pytest.approx(started(x)[0].step.item(), rel=0.05)


def test_nothing_is_learned_from_nothing():
    quantizer, y = started(torch.empty(0, 3, 5))
    assert y.shape == (0, 3, 5)
    assert not quantizer.initialized
    quantizer(torch.rand(2, 3, 5))
    step = quantizer.step.item()
    assert step != 1
    quantizer(torch.rand(2, 3, 5) * 100)  # the first tensor decides
    quantizer(torch.empty(0, 3, 5)).sum().backward()
    assert quantizer.step.item() == step
    assert quantizer.step.grad == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "config", [quantize.Uniform(8, activation_bits=8), quantize.DiffQ(activation_bits="learned")], ids=["8", "learned"]
)
def test_nothing_is_learned_from_zeros(config, training):
    model = quantize.prepare(nn.Sequential(nn.Linear(64, 4)), config).train(training)
    quantizer = model[0].activation_quantizer
    assert quantizer(torch.zeros(1, 64)).eq(0).all()
    quantize.calibrate(model, [torch.zeros(1, 64)])
    assert not quantizer.initialized and not quantizer.seen
    with pytest.raises(ValueError, match="must have seen data"):
        quantize.convert(copy.deepcopy(model))
    x = torch.randn(32, 64)
    assert relative_error(quantizer(x), x) < 1e-3
    assert quantizer.initialized and quantizer.seen


def test_zeros_before_the_start_in_one_graph():
    # The layer's bias starts the grid in the second call; the first call's graph needs the grid of before.
    model = quantize.prepare(nn.Sequential(layer := nn.Linear(8, 8), layer), quantize.Uniform(4, activation_bits=8))
    model(torch.zeros(4, 8)).sum().backward()
    quantizer = model[0].activation_quantizer
    assert quantizer.initialized and quantizer.step.grad.isfinite() and model[0].bias.grad.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_tensor_must_be_finite(bad):
    quantizer = ActivationQuantizer(4)
    with pytest.raises(ValueError, match="ActivationQuantizer: input must be finite; got values from"):
        quantizer(torch.tensor([1.0, bad]))
    assert not quantizer.initialized
    assert quantizer(torch.rand(3)).isfinite().all()


def test_the_gradient_is_scaled_by_features_and_levels():
    x = torch.randn(6, 5, 4)
    quantizer, y = started(x, 3)
    y.sum().backward()
    alone = torch.ops.quantize.lsq_backward(torch.ones_like(x), x, quantizer.step, quantizer.zero_point, 7, 1.0)[1]
    assert quantizer.step.grad.item() == pytest.approx(alone.item() / (20 * 7) ** 0.5, rel=1e-6)


def test_training_finds_a_better_step():
    x = torch.randn(64, 100).relu()
    quantizer, _ = started(x, 3)
    with torch.no_grad():
        quantizer.step.mul_(3)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.3 * errors[0]
    assert relative_error(quantizer(x), x) < 1.1 * relative_error(started(x, 3)[1], x)


# ------------------------------------------------------------------------------------------------------------- calibration


def network(config=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 5))
    return quantize.prepare(model, config or quantize.Uniform(8, activation_bits=4))


def batches(n=3):
    return [torch.randn(16, 3, 8, 8) for _ in range(n)]


@pytest.mark.parametrize("method", METHODS)
def test_calibrate(method):
    model, data = network(), batches()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model[1].state_dict().items()}
    assert quantize.calibrate(model, data, method) is model
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model[1].state_dict().items())
    assert all(m.observer is None and m.initialized for m in model.modules() if isinstance(m, ActivationQuantizer))
    x, first = torch.cat(data), model[0].activation_quantizer
    if method == "minmax":
        assert first.step.item() == pytest.approx(float(x.max() - x.min()) / 15, rel=1e-6)
    assert model[5].activation_quantizer.zero_point == 0  # after a ReLU
    model.eval()
    with torch.no_grad():
        plain = network({"*": quantize.Uniform(8)}).eval()
        assert nn.functional.cosine_similarity(model(x).flatten(), plain(x).flatten(), dim=0) > 0.97
    assert relative_error(first(x), x) < {"mse": 0.013, "minmax": 0.03, "percentile": 0.03}[method]


def test_methods_differ_where_there_are_outliers():
    x = torch.randn(64, 500)
    x[0, 0] = 1000.0
    errors = {}
    for method in METHODS:
        model = quantize.prepare(nn.Sequential(nn.Linear(500, 3)), quantize.Uniform(8, activation_bits=8))
        quantize.calibrate(model, x.split(16), method)
        errors[method] = float((model[0].activation_quantizer(x).detach() - x)[:, 1:].square().mean())
    assert errors["percentile"] < 0.01 * errors["minmax"]
    step = (1000 - float(x.min())) / 255
    assert errors["minmax"] == pytest.approx(float(((x / step).round() * step - x)[:, 1:].square().mean()), rel=1e-5)


def test_batches_may_be_tuples_and_loaders():
    data = torch.utils.data.TensorDataset(torch.cat(batches()), torch.arange(48))
    states = []
    for source in (torch.utils.data.DataLoader(data, 16), list(torch.utils.data.DataLoader(data, 16)), [data.tensors[0]]):
        model = network().eval()
        quantize.calibrate(model, source, "minmax")
        states.append([model[i].activation_quantizer.step.item() for i in (0, 5)])
    assert states[0] == states[1]
    assert states[0] == pytest.approx(states[2], rel=1e-5)


def test_a_layer_that_nothing_reached_waits_for_its_first_input():
    model = network()
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: nn.Sequential.forward(model[:6], x)
    quantize.prepare(model.spare, quantize.Uniform(8, activation_bits=8))
    quantize.calibrate(model, batches())
    assert model[0].activation_quantizer.initialized
    assert not model.spare.activation_quantizer.initialized
    model.spare(torch.rand(5, 3) * 100)
    assert model.spare.activation_quantizer.step > 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, []), TypeError, "calibrate: model must be an nn.Module; got int"),
        ((network(), None), TypeError, "calibrate: batches must be iterable; got NoneType"),
        ((network(), "abc"), TypeError, "calibrate: batches must be iterable; got str"),
        ((network(), torch.ones(2, 3, 8, 8)), TypeError, r"batches must be an iterable of inputs, .*; got one Tensor\[2, 3, 8, 8\]"),
        ((nn.Linear(3, 3), [torch.ones(2, 3)]), ValueError, "it has no activation quantizers"),
        ((network(), batches(), "max"), ValueError, "method must be one of 'mse', 'minmax', 'percentile'; got 'max'"),
        ((network(), []), ValueError, "walk 1 got nothing"),
        ((network(), iter(batches())), ValueError, "walk 2 got nothing"),
        ((network(), [torch.full((1, 3, 8, 8), torch.nan)]), ValueError, "input must be finite"),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize.calibrate(*arguments)
    if isinstance(arguments[0], nn.Sequential):
        quantizers = [m for m in arguments[0].modules() if isinstance(m, ActivationQuantizer)]
        assert all(q.observer is None and not q.initialized and q.step == 1 for q in quantizers)
        assert arguments[0].training


def test_a_grid_from_a_histogram():
    observer = Observer()
    x = torch.randn(10_000).relu()
    for _ in range(2):
        for part in x.split(1000):
            observer.observe(part)
        observer.advance()
    assert observer.counts.sum() == 10_000
    assert observer.grid(15, "minmax") == (pytest.approx(float(x.max()) / 15), 0)
    assert Observer().grid(15, "mse") == (1.0, 0)


# ------------------------------------------------------------------------------------------------------------- checkpoints, processes


def test_state_dict_remembers_that_data_were_seen():
    model = quantize.calibrate(network(), batches())
    other = network()
    assert not other[0].activation_quantizer.initialized
    other.load_state_dict(model.state_dict())
    x = batches(1)[0] * 100
    assert other[0].activation_quantizer.initialized
    assert torch.equal(other.eval()(x), model.eval()(x))
    other.load_state_dict(network().state_dict())
    assert not other[0].activation_quantizer.initialized
    assert copy.deepcopy(model)[0].activation_quantizer.initialized


@pytest.fixture(scope="module")
def results(gloo):
    """What each process wrote."""
    folder = gloo(processes.__file__)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", processes.CASES)
def test_two_processes_are_one_batch(results, name):
    assert torch.equal(results[0][name]["start"]["step"], processes.started(processes.joint(name))["step"])
    for method in ["start", *METHODS]:
        alone = processes.started(processes.joint(name)) if method == "start" else None
        if alone is None:
            alone = processes.calibrated(processes.joint(name).split(16), method)
        for result in results:
            assert result[name][method].keys() == alone.keys()
            for key, value in alone.items():
                # fp32 matrix products of other batch sizes move the second layer's inputs by their rounding
                torch.testing.assert_close(result[name][method][key], value, rtol=0 if "0.activation" in key else 1e-4, atol=0)


def test_reports_of_one_process_wait_for_no_other(results):
    alone = processes.started(processes.joint("equal"))
    for result in results:
        assert all(torch.equal(value, alone[key]) for key, value in result["reported"].items())


def test_training_in_two_processes_is_training_on_the_joint_batch(results):
    alone = processes.trained("equal", None)
    for key, value in alone.items():
        assert torch.equal(results[0]["trained"][key], results[1]["trained"][key])
        torch.testing.assert_close(results[0]["trained"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, "learned"])
def test_dead_layers_convert(bits):
    # Nothing but zeros says nothing about a layer's range, unless the others have seen more.
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.constant_(model[0].bias, -100.0)
    config = quantize.Uniform(4, activation_bits=4) if bits == 4 else quantize.DiffQ(activation_bits=bits)
    x = torch.randn(8, 16)
    with pytest.raises(ValueError, match="layer '0' .*must have seen data"):
        quantize.convert(quantize.prepare(copy.deepcopy(model), config).eval())
    for see in (lambda m: quantize.calibrate(m, [x]), lambda m: m(x)):
        prepared = quantize.prepare(copy.deepcopy(model), config)
        see(prepared)
        prepared.eval()
        assert not prepared[2].activation_quantizer.initialized
        assert torch.equal(quantize.convert(prepared)(x), model[2].bias.expand(8, 4))


@pytest.mark.parametrize("config", [quantize.Uniform(4, activation_bits=4), quantize.DiffQ(activation_bits="learned")], ids=str)
def test_evaluation_beside_other_processes_changes_nothing(config, monkeypatch):
    model = quantize.prepare(nn.Sequential(nn.Linear(16, 16)), config).eval()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 16)
    alone = copy.deepcopy(model)(x)
    monkeypatch.setattr(lsq, "_has_partners", lambda: True)
    (model(x) + model(torch.randn(3, 16) * 5)).sum().backward()
    assert torch.equal(model(x), alone)
    assert not model[0].activation_quantizer.initialized
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config", [quantize.Uniform(8, activation_bits=4), quantize.DiffQ(activation_bits="learned")], ids=["LSQ", "learned"]
)
def test_an_average_made_before_the_first_batch(config):
    model = quantize.prepare(nn.Sequential(nn.Linear(8, 8)), config)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        model(torch.randn(16, 8))
        average.update_parameters(model)
    own, other = average.module[0].activation_quantizer, model[0].activation_quantizer
    want = model.eval()(x := 100 * torch.randn(4, 8))
    assert torch.equal(quantize.convert(average.module)(x), quantize.convert(model)(x))
    assert torch.equal(average.eval()(x), want) and torch.equal(own.step, other.step)


@pytest.mark.parametrize("config", [quantize.Uniform(4, activation_bits=8), quantize.DiffQ(activation_bits="learned")])
@pytest.mark.parametrize("average", [None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)], ids=["mean", "moving"])
def test_averages_with_buffers(config, average):
    model, x = quantize.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), config), torch.randn(2, 3, 8, 8)
    model(x)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    assert torch.allclose(averaged.eval()(x), model.eval()(x), atol=1e-5)


def test_checkpoints_whose_flags_are_bools():
    model = quantize.prepare(nn.Sequential(nn.Linear(4, 2)), quantize.Uniform(4, activation_bits=8))
    model(torch.randn(3, 4))
    state = {name: value.bool() if name.endswith("seen") else value for name, value in model.state_dict().items()}
    other = quantize.prepare(nn.Sequential(nn.Linear(4, 2)), quantize.Uniform(4, activation_bits=8))
    other.load_state_dict(state)
    x = torch.randn(3, 4)
    assert other[0].activation_quantizer.initialized and torch.equal(other.eval()(x), model.eval()(x))
