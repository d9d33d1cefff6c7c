"""What loss_fn returns: named by variance_report() and measure_sensitivity(), with layers and choices; checkpoints stay."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantize
from quantize import QModule
from quantize.mixed_precision import measure

X, Y = torch.randn(4, 5), torch.randint(3, (4,))
WRONG = [
    (lambda z, y: z.sum(1), ValueError, r"a scalar Tensor; got \[4\]"),
    (lambda z, y: 0.5, TypeError, "a scalar Tensor; got float"),
    (lambda z, y: None, TypeError, "a scalar Tensor; got NoneType"),
    (lambda z, y: z.sum() > 0, TypeError, "a scalar Tensor of a real number; got torch.bool"),
    (lambda z, y: z.sum() * torch.nan, ValueError, "a finite loss; got nan of"),
]


def line():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("loss_fn, error, message", WRONG, ids=["vector", "float", "nothing", "boolean", "NaN"])
def test_losses_are_checked(loss_fn, error, message):
    with pytest.raises(error, match=f"^variance_report: loss_fn must return {message}"):
        quantize.variance_report(QModule(line()), [(X, Y)], loss_fn)
    for method in ("diagonal", "clado"):
        with pytest.raises(error, match=f"^measure_sensitivity: loss_fn must return {message}"):
            quantize.measure_sensitivity(line(), [(X, Y)], [(4, None)], method, "loss", loss_fn=loss_fn, progress=False)


def test_losses_of_one_element_will_do():
    one = [(X, Y)]
    values = [
        quantize.variance_report(QModule(line().requires_grad_()), one, lambda z, y, shape=shape: z.sum().reshape(shape))
        for shape in ([], [1])
    ]
    assert all(value.sample == 0 for value in values)


def test_losses_without_a_gradient():
    with pytest.raises(ValueError, match="^variance_report: loss_fn must return a loss with a gradient; got one without, of batch 0"):
        quantize.variance_report(QModule(line()), [(X, Y)], lambda z, y: z.detach().sum())


@pytest.mark.parametrize("target, found", [(None, "NoneType"), (3, "int"), (torch.tensor(1), "a Tensor without dimensions")])
def test_targets_without_a_length(target, found):
    config = quantize.ActivationConfig(use_gradient=True)
    with pytest.raises(TypeError, match=f"^variance_report: batches must have targets with a length .*; got {found} in number 1"):
        quantize.variance_report(QModule(line(), config), [(X, Y), (X, target)], lambda z, y: z.sum())
    quantize.variance_report(QModule(line()), [(X, target)], lambda z, y: z.sum(), draws=1)  # where none is needed


class Fails:
    """A loss that is not finite from its n-th call on."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, z, y):
        self.calls -= 1
        return F.cross_entropy(z, y) if self.calls > 0 else z.sum() / 0


@pytest.mark.parametrize(
    "method, calls, chosen",
    [("diagonal", 3, "'g' at w4a8"), ("clado", 3, "'g' at w2 and '2' at w2"), ("clado", 4, "'g' at w2 and '2' at w4a8")],
)
def test_layers_whose_loss_is_not_finite(method, calls, chosen, tmp_path):
    path, batches = tmp_path / "c", [(X, Y), (X + 1, Y)]

    def run(loss_fn):
        more = {"groups": {"g": "0"}, "loss_fn": loss_fn, "checkpoint": path, "progress": False}
        return quantize.measure_sensitivity(model, batches, [(2, None), (4, 8)], method, "loss", **more)

    model = line()
    with pytest.raises(ValueError, match=rf"^measure_sensitivity: loss_fn must return a finite loss; got -?(inf|nan) with {chosen}$"):
        run(Fails(calls))
    assert path.exists() == (method == "diagonal")  # where a unit was through
    run(Fails(1000))
    assert not path.exists()


@pytest.mark.parametrize("method", ["gauss_newton", "composed", "diagonal"])
def test_a_checkpoint_stays_until_the_end(method, tmp_path, monkeypatch):
    model, path, made = line(), tmp_path / "c", measure.Sensitivity
    monkeypatch.setattr(measure, "Sensitivity", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize.measure_sensitivity(model, [(X, Y)], [(2, None)], method, checkpoint=path, progress=False)
    assert path.exists()
    monkeypatch.setattr(measure, "Sensitivity", made)
    got = quantize.measure_sensitivity(model, [(X, Y)], [(2, None)], method, checkpoint=path, progress=False)
    assert not path.exists()
    assert torch.equal(got.matrix, quantize.measure_sensitivity(model, [(X, Y)], [(2, None)], method, progress=False).matrix)
