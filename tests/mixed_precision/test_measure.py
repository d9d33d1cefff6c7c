"""measure_sensitivity() against the long way: a prepared copy of the model for every entry."""

import copy
import functools
import itertools

import pytest
import torch
from sensitivity_models import Exact, Residual, Tied, images, kl, logits_of, loss_growth, rows, trained, twin
from torch import nn
from torch.nn import functional as F

import quantize
from quantize import XNOR, DiffQ, DoReFa, PowerOfTwo, Sensitivity, Ternary, Uniform

CHOICES = [(2, None), (None, None), (2, 4), (8, 8)]
measure = functools.partial(quantize.measure_sensitivity, progress=False)


def made(quantizer, choice):
    """The configuration of a choice, as a user would write it."""
    weight, activation = choice
    if quantizer is DiffQ:
        return DiffQ(min_bits=weight, max_bits=weight, init_bits=weight, activation_bits=activation)
    if quantizer in (Ternary, XNOR):
        return quantizer(activation_bits=activation)
    return quantizer(weight, activation_bits=activation)


def changed_logits(model, batches, groups, choices, quantizer=Uniform):
    """{(layer, choice): logits with that layer alone at that choice}; not of (None, None)."""
    return {
        (layer, k): logits_of(twin(model, dict.fromkeys(names, made(quantizer, choice)), batches), batches)
        for layer, names in enumerate(groups)
        for k, choice in enumerate(choices)
        if choice != (None, None)
    }


def close(got, want, relative=1e-9):
    torch.testing.assert_close(got, want, rtol=relative, atol=1e-12 * float(want.abs().max()))


def gauss_newton(model, batches, groups, choices, quantizer=Uniform):
    """E[dz' (diag(p) - pp') dz] / 2, sample by sample."""
    reference = logits_of(model, batches)
    p = reference.softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.zeros(len(groups) * len(choices), len(groups) * len(choices), dtype=torch.float64)
    changes = {
        layer * len(choices) + k: z - reference
        for (layer, k), z in changed_logits(model, batches, groups, choices, quantizer).items()
    }  # fmt: skip
    for i, j in itertools.product(changes, changes):
        matrix[i, j] = sum(a @ h @ b for a, h, b in zip(changes[i], hessians, changes[j], strict=True)) / len(p) / 2
    return matrix


def differences(model, batches, groups, choices, metric, pairs=True):
    """Single growths on the diagonal; beside it what a pair's growth has beyond them, halved."""
    reference, each = logits_of(model, batches), len(choices)
    singles = {
        layer * each + k: metric(reference, z) for (layer, k), z in changed_logits(model, batches, groups, choices).items()
    }  # fmt: skip
    matrix = torch.zeros(len(groups) * each, len(groups) * each, dtype=torch.float64)
    for i, j in itertools.product(singles, singles):
        if i == j:
            matrix[i, i] = singles[i]
        elif pairs and i // each != j // each:
            both = {name: made(Uniform, choices[at % each]) for at in (i, j) for name in groups[at // each]}
            matrix[i, j] = (metric(reference, logits_of(twin(model, both, batches), batches)) - singles[i] - singles[j]) / 2
    return matrix


@pytest.fixture
def residual():
    return trained(Residual())


LAYERS = [["conv1"], ["conv2"], ["fc"]]


def test_gauss_newton_is_the_formula(residual):
    batches = images(5, 3)
    sensitivity = measure(residual, batches, CHOICES)
    assert sensitivity.layers == ("conv1", "conv2", "fc") and sensitivity.choices == tuple(CHOICES) and sensitivity.samples == 8
    assert (sensitivity.method, sensitivity.metric) == ("gauss_newton", "kl")
    close(sensitivity.matrix, gauss_newton(residual, batches, LAYERS, CHOICES))
    eigenvalues = torch.linalg.eigvalsh(sensitivity.matrix)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1] and sensitivity.values[:, 0].min() > 0
    kept = torch.arange(12) % 4 == 1
    assert not sensitivity.matrix[kept].any() and not sensitivity.matrix[:, kept].any()


def test_the_loss_has_a_linear_term(residual):
    batches = images(5, 3)
    sensitivity = measure(residual, batches, CHOICES, metric="loss")
    reference, want = logits_of(residual, batches), gauss_newton(residual, batches, LAYERS, CHOICES)
    slope = reference.softmax(1) - F.one_hot(torch.cat([targets for _, targets in batches]), 4)
    for (layer, k), z in changed_logits(residual, batches, LAYERS, CHOICES).items():
        want[4 * layer + k, 4 * layer + k] += (slope * (z - reference)).sum(1).mean()
    close(sensitivity.matrix, want)


def test_steps_are_those_of_calibrate(residual):
    batches = images(5, 3)
    sensitivity, reference = measure(residual, batches, [(3, 3)], "diagonal"), logits_of(residual, batches)
    for name, value in zip(sensitivity.layers, sensitivity.values, strict=True):
        prepared = quantize.prepare(copy.deepcopy(residual), {"*": None, name: Uniform(3, 3)})
        quantize.calibrate(prepared, [inputs for inputs, _ in batches])
        assert float(value) == pytest.approx(kl(reference, logits_of(prepared, batches)), rel=1e-9)


def test_targets_may_be_probabilities(residual):
    batches = images(5, 3)
    soft = [(inputs, F.one_hot(targets, 4).float()) for inputs, targets in batches]
    for method in ("gauss_newton", "diagonal"):
        close(*(measure(residual, b, CHOICES, method, "loss").matrix for b in (soft, batches)))


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_diagonal(residual, metric):
    batches = images(5, 3)
    sensitivity = measure(residual, batches, CHOICES, "diagonal", metric)
    growth = kl if metric == "kl" else loss_growth(torch.cat([targets for _, targets in batches]))
    close(sensitivity.matrix, differences(residual, batches, LAYERS, CHOICES, growth, pairs=False), 1e-8)


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_pairs(residual, metric):
    batches, choices = images(5, 3), [(2, 4), (None, None), (3, None)]
    sensitivity = measure(residual, batches, choices, "clado", metric)
    growth = kl if metric == "kl" else loss_growth(torch.cat([targets for _, targets in batches]))
    close(sensitivity.matrix, differences(residual, batches, LAYERS, choices, growth), 1e-8)
    assert torch.equal(sensitivity.matrix, sensitivity.matrix.T)
    inside = torch.block_diag(*[torch.ones(3, 3)] * 3).bool() & ~torch.eye(9).bool()
    assert not sensitivity.matrix[inside].any() and sensitivity.matrix[~inside].count_nonzero() == 6 + 2 * 3 * 4


def test_composed():
    """What two layers do together, from the logits of prepared copies."""
    model, batches, choices = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), rows(5, 3), [(2, None), (None, None), (2, 3)]
    sensitivity, groups = measure(model, batches, choices, "composed"), [["0"], ["2"]]
    assert (sensitivity.method, sensitivity.link) == ("composed", "log1p")
    reference, changed = logits_of(model, batches), changed_logits(model, batches, groups, choices)
    centred = reference - reference.mean(1, keepdim=True)
    kept = {at: 1 - min(max(-float(((z - reference) * centred).sum() / centred.square().sum()), 0), 1) for at, z in changed.items()}
    added = {at: z - z.mean(1, keepdim=True) - kept[at] * centred for at, z in changed.items()}
    for a, b in itertools.product((0, 2), repeat=2):
        first, second = (0, a), (1, b)
        together = kept[first] * kept[second] * centred + kept[second] * added[first] + kept[first] * added[second]
        predicted = sensitivity.predict({"0": choices[a], "2": choices[b]})
        assert predicted == pytest.approx(kl(reference, together), rel=1e-8)
        assert sensitivity.predict({"0": choices[a], "2": (None, None)}) == pytest.approx(kl(reference, changed[first]), rel=1e-8)


def test_a_loss_of_its_own(residual):
    batches = [(inputs, {"wanted": torch.randn(len(inputs), 4), "n": 1}) for inputs, _ in images(5, 5)]
    batches = [(inputs, list(targets["wanted"])) for inputs, targets in batches]  # anything with a length

    def loss(output, targets):
        return (output - torch.stack(targets)).square().mean()

    sensitivity = measure(residual, batches, [(2, None), (4, None)], "diagonal", "loss", loss_fn=loss)
    reference, wanted = logits_of(residual, batches), torch.cat([torch.stack(targets) for _, targets in batches]).double()
    for (layer, k), z in changed_logits(residual, batches, LAYERS, [(2, None), (4, None)]).items():
        growth = (z - wanted).square().mean() - (reference - wanted).square().mean()
        assert float(sensitivity.values[layer, k]) == pytest.approx(float(growth), rel=1e-8)


# ------------------------------------------------------------------------------------------------ quantizers

NORMED = nn.Sequential(
    nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Hardtanh(), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 4)
)


@pytest.mark.parametrize(
    "quantizer, choices",
    [
        (Uniform, [(2, None), (3, 5), (8, 8)]),
        (PowerOfTwo, [(3, None), (4, 8)]),
        (DoReFa, [(1, 1), (2, None), (4, 4), (16, 16)]),
        (DiffQ, [(2, None), (5, 8), (12, None)]),
        (Ternary, [(2, None), (2, 4)]),
        (XNOR, [(1, None), (1, 1)]),
        (functools.partial(Uniform, scale="learned"), [(2, None), (4, 8)]),
        (lambda weight, activation_bits: PowerOfTwo(weight, False, activation_bits), [(4, None), (5, 8)]),
    ],
    ids=["Uniform", "PowerOfTwo", "DoReFa", "DiffQ", "Ternary", "XNOR", "learned", "function"],
)
def test_quantizers(quantizer, choices):
    model, batches = trained(copy.deepcopy(NORMED)), images(6)
    sensitivity = measure(model, batches, choices, quantizer=quantizer)
    close(sensitivity.matrix, gauss_newton(model, batches, [["0"], ["3"], ["6"]], choices, quantizer))
    assert sensitivity.configs == tuple(made(quantizer, choice) for choice in choices)
    assert sensitivity.values.min() > 0


def test_full_precision_alone():
    sensitivity = measure(Exact(), images(3), [(None, None)])
    assert not sensitivity.matrix.any() and sensitivity.configs == (None,) and sensitivity.bit_ops[2].tolist() == [24 * 4 * 1024]


# ------------------------------------------------------------------------------------------------ layers


def test_groups(residual):
    batches, groups = images(5, 3), [["conv1", "conv2"], ["fc"]]
    sensitivity = measure(residual, batches, [(2, None), (3, 8)], groups={"stage": "conv?"})
    assert sensitivity.layers == ("stage", "fc") and sensitivity.members == {"stage": ("conv1", "conv2"), "fc": ("fc",)}
    close(sensitivity.matrix, gauss_newton(residual, batches, groups, [(2, None), (3, 8)]))
    pairs = measure(residual, batches, [(2, None), (3, 8)], "clado", groups={"stage": ["conv1", "*2"], "end": "fc"})
    close(pairs.matrix, differences(residual, batches, groups, [(2, None), (3, 8)], kl), 1e-8)
    apart = measure(residual, batches, [(2, None), (3, 8)])
    assert torch.equal(sensitivity.bytes[0], apart.bytes[:2].sum(0)) and torch.equal(sensitivity.bit_ops[0], apart.bit_ops[:2].sum(0))


def test_skip(residual):
    batches = images(5)
    sensitivity, full = (measure(residual, batches, CHOICES, skip=skip) for skip in (["conv1", "f*"], ()))
    assert sensitivity.layers == ("conv2",)
    close(sensitivity.matrix, full.matrix[4:8, 4:8], 0)


@pytest.mark.parametrize("method", ["gauss_newton", "clado"])
def test_layers_that_share_a_weight_are_one(method):
    model, batches = trained(Tied()), [(torch.randint(12, (6, 4)), torch.randint(3, (6,)))]
    sensitivity = measure(model, batches, [(2, None), (4, 8)], method)
    assert sensitivity.members == {"inner": ("inner", "head"), "last": ("last",)}
    groups = [["inner", "head"], ["last"]]
    if method == "clado":
        close(sensitivity.matrix, differences(model, batches, groups, [(2, None), (4, 8)], kl), 1e-8)
    else:
        close(sensitivity.matrix, gauss_newton(model, batches, groups, [(2, None), (4, 8)]))
    # A group takes all of them.
    assert measure(model, batches, [(2, None)], groups={"g": ["inner", "head"]}).members["g"] == ("inner", "head")
    assert measure(model, batches, [(2, None)], groups={"g": ["inner", "last"]}).members["g"] == ("inner", "head", "last")


def test_other_parametrizations_are_not_ties():
    model = nn.Sequential(*[nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)) for _ in range(4)])
    batches = rows(6, classes=5)
    sensitivity = measure(model, batches, [(2, None), (4, None)])
    assert sensitivity.layers == ("0", "1", "2", "3")
    close(sensitivity.matrix, gauss_newton(model, batches, [[name] for name in "0123"], [(2, None), (4, None)]))


def test_names_with_glob_characters():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"a[bc]": nn.Linear(5, 6), "ab": nn.Linear(6, 6), "*": nn.Linear(6, 6), "?": nn.Linear(6, 3)})

        def forward(self, x):
            for part in self.parts.values():
                x = part(x).relu()
            return x

    model, batches = Named(), rows(6)
    sensitivity = measure(model, batches, [(2, None), (8, None)])
    assert sensitivity.layers == ("parts.a[bc]", "parts.ab", "parts.*", "parts.?")
    assert sensitivity.bytes.tolist() == [[6 * 8 + 24 + 24, 6 * 8 + 24 + 24], [6 * 8 + 48] * 2, [6 * 8 + 48] * 2, [3 * 8 + 24] * 2]
    grouped = measure(model, batches, [(2, None)], groups={"g": ["parts.a[[]bc]", "parts.[*]"]}, skip="parts.[?]")
    assert grouped.members == {"g": ("parts.a[bc]", "parts.*"), "parts.ab": ("parts.ab",)}


# ------------------------------------------------------------------------------------------------ batches, and what stays as it was


@pytest.mark.parametrize("method, metric", [*itertools.product(("gauss_newton", "clado", "diagonal"), ("kl", "loss")), ("composed", "kl")])
def test_batches_are_samples_in_any_order(method, metric):
    model, choices = Exact(), [(2, None), (3, 4)]
    x, targets = torch.randint(-4, 5, (12, 3, 6, 6)).float(), torch.randint(4, (12,))
    one = measure(model, [(x, targets)], choices, method, metric)
    split = [(x[a:b], targets[a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    for batches in (split, split[::-1]):
        several = measure(model, iter(batches), choices, method, metric)
        torch.testing.assert_close(several.matrix, one.matrix, rtol=1e-4, atol=1e-6 * float(one.matrix.abs().max()))
        assert torch.equal(several.bytes, one.bytes) and torch.equal(several.bit_ops, one.bit_ops) and several.samples == 12


@pytest.mark.parametrize("method", ["gauss_newton", "composed", "clado", "diagonal"])
def test_nothing_of_the_model_changes(method):
    model, batches = trained(Residual()), images(4, 3)
    model.train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones(4, 6)
    seen = []
    model.conv2.register_forward_hook(lambda module, args, output: seen.append(module.training))
    loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    kept, want = copy.deepcopy(batches), measure(copy.deepcopy(model).eval(), batches, CHOICES, method)

    def all_of_it():
        modules = [(m, type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]
        return modules, [(p, p.requires_grad, p.grad) for p in model.parameters()], list(model._buffers), list(model.state_dict())

    before, state, generator = all_of_it(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters, seen[:] = [(id(p), p.data_ptr()) for p in model.parameters()], []
    got = measure(model, batches, CHOICES, method)
    after = all_of_it()
    assert before[0] == after[0] and before[2:] == after[2:] and [g[1:2] for g in before[1]] == [g[1:2] for g in after[1]]
    assert parameters == [(id(p), p.data_ptr()) for p in model.parameters()] and torch.equal(model.fc.weight.grad, torch.ones(4, 6))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for new, old in zip(batches, kept, strict=True) for a, b in zip(new, old, strict=True))
    assert seen and not any(seen)  # measured in evaluation mode
    assert torch.equal(got.matrix, want.matrix)
    loss.backward()  # its graph is whole


def test_a_model_made_for_compressed_training():
    model, batches = trained(Residual()), images(4)
    want = measure(model, batches, CHOICES)
    got = measure(quantize.QModule(copy.deepcopy(model)), batches, CHOICES)
    assert got.layers == want.layers and torch.equal(got.bytes, want.bytes)
    assert torch.equal(got.matrix, want.matrix) and torch.equal(got.bit_ops, want.bit_ops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["gauss_newton", "clado", "diagonal"])
def test_half_precision(method, dtype):
    model, batches = trained(Residual()).to(dtype), [(inputs.to(dtype), targets) for inputs, targets in images(5)]
    sensitivity = measure(model, batches, [(2, None), (2, 4)], method)
    if method == "gauss_newton":
        close(sensitivity.matrix, gauss_newton(model, batches, LAYERS, [(2, None), (2, 4)]))
    else:
        close(sensitivity.values, differences(model, batches, LAYERS, [(2, None), (2, 4)], kl, False).diagonal().view(3, 2), 1e-8)


def test_autocast(residual):
    batches = images(6)
    with torch.autocast("cpu", torch.bfloat16):
        got = measure(residual, batches, [(2, None), (2, 4)])
        want = gauss_newton(residual, batches, LAYERS, [(2, None), (2, 4)])
    close(got.matrix, want)


def test_positions_count_as_samples():
    class Dense(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1))

    model, batches = Dense(), [(torch.randn(3, 3, 5, 5), torch.randint(4, (3, 3, 3))) for _ in range(2)]
    sensitivity = measure(model, batches, [(2, None)])
    assert sensitivity.samples == 2 * 27
    z0 = torch.cat([model(x) for x, _ in batches]).detach().movedim(1, -1).reshape(-1, 4).double()
    for layer, name in enumerate(("0", "2")):
        z = logits_of(twin(model, {name: Uniform(2)}, batches), batches).movedim(1, -1).reshape(-1, 4)
        p = z0.softmax(1)
        want = ((p * (z - z0).square()).sum(1) - (p * (z - z0)).sum(1).square()).mean() / 2
        assert float(sensitivity.values[layer, 0]) == pytest.approx(float(want), rel=1e-9)
        for method, metric in (("diagonal", "loss"), ("gauss_newton", "loss")):
            other = measure(model, batches, [(2, None)], method, metric).values[layer, 0]
            growth = F.cross_entropy(z, torch.cat([t for _, t in batches]).flatten()) - F.cross_entropy(
                z0, torch.cat([t for _, t in batches]).flatten()
            )
            assert float(other) == pytest.approx(float(growth), rel=1e-8 if method == "diagonal" else 0.5)


def test_it_is_a_sensitivity(residual):
    sensitivity = measure(residual, images(5), CHOICES)
    assert isinstance(sensitivity, Sensitivity)
    sensitivity.check_model(residual)
    assert sensitivity.shapes["conv1"] == {"weight": (6, 3, 3, 3)} and sensitivity.parameters.tolist() == [162, 324, 24]


@pytest.mark.parametrize("form", [lambda y: {"y": y}, lambda y: (y, None)])
def test_structures_of_targets_count_as_their_samples(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(n, 6), torch.randint(3, (n,))) for n in (8, 2)]

    def loss(output, target):
        target = target["y"] if isinstance(target, dict) else target[0] if isinstance(target, tuple) else target
        return torch.nn.functional.cross_entropy(output, target)

    def measured(data):
        return quantize.measure_sensitivity(model, data, [(2, None)], "diagonal", "loss", loss_fn=loss, progress=False)

    plain, wrapped = measured(batches), measured([(x, form(y)) for x, y in batches])
    assert wrapped.samples == plain.samples == 10
    assert torch.equal(wrapped.matrix, plain.matrix)


def test_in_inference_mode():
    model, batches = nn.Sequential(nn.Linear(6, 3)), [(torch.randn(4, 6), torch.randint(3, (4,)))]
    expected = quantize.measure_sensitivity(model, batches, [(2, 4)], progress=False)
    with torch.inference_mode():
        assert torch.equal(quantize.measure_sensitivity(model, batches, [(2, 4)], progress=False).matrix, expected.matrix)
