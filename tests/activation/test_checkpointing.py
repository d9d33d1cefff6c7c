"""Activation checkpointing around compressed layers: gradients belong to the output that was returned."""

import pytest
import torch
import torch.nn.functional as F
from exact_levels import EXACT, levels
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import quantize

FIXED = quantize.ActivationConfig(bits=2, max_bits=2)
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


class Checkpointed(nn.Module):
    """A body under checkpoint, or not; what follows it and precedes it is not."""

    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant = body, reentrant
        self.last = nn.Dropout(0.3)

    def forward(self, x):
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.last(x)


def gradients(model, x, seed=3):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [t.grad.clone() for t in (x, *model.parameters()) if t.grad is not None]


BODIES = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.5)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Dropout(0.5)),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(3, momentum=0.0), nn.Dropout(0.5)),
    "batch norm without weights": lambda: nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(1, bias=False)
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Dropout(0.5)),
    "frozen": lambda: nn.Sequential(nn.Conv2d(3, 6, 3).requires_grad_(False), nn.Dropout(0.5)),
}  # fmt: skip


@REENTRANT
@pytest.mark.parametrize("name", BODIES)
def test_dropout_is_the_same_in_both_forwards(name, reentrant):
    # Each body's first layer packs levels, so its gradient is exact if the second forward draws the first one's dropout.
    torch.manual_seed(1)
    body = BODIES[name]()
    x = levels(4, 3, 8, 8)
    body(x)
    results = []
    for how in (None, reentrant):
        model = quantize.QModule(Checkpointed(body, how), EXACT)
        results.append(gradients(model, x))
        quantize.QModule(model, {})
    for got, want in zip([results[1][0], *results[1][1]], [results[0][0], *results[0][1]], strict=True):
        tolerance = 0.05 if name == "batch norm without weights" else 1e-5  # its linear layer's input is no level
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@REENTRANT
def test_layers_by_hand(reentrant):
    body = nn.Sequential(quantize.QConv2d(3, 6, 3, config=EXACT), quantize.QDropout(0.5))
    x = levels(4, 3, 8, 8)
    (y, exact), (again, got) = gradients(Checkpointed(body, None), x), gradients(Checkpointed(body, reentrant), x)
    assert torch.equal(y, again)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b)


class Block(nn.Module):
    """Two consumers of one tensor, functional calls, an in-place ReLU, a layer with a forward of its own."""

    class Own(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias)

    def __init__(self):
        super().__init__()
        self.left, self.right, self.own = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), self.Own(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.relu_(self.norm(self.left(x)) + self.right(x))
        return F.dropout(F.silu(self.own(x)), 0.1) * x.mean((2, 3), keepdim=True).sigmoid()


@REENTRANT
@pytest.mark.parametrize("config", [FIXED, quantize.ActivationConfig(bits=2)], ids=["fixed", "adaptive"])
def test_a_model_trains_step_after_step(config, reentrant):
    # Adaptive bits move between the layers, also between two that share a tensor.
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 3), nn.ModuleList([Block(), Block()]), nn.LazyLinear(5)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x.flatten(1))

    model = Model()
    x, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    model(x)
    model = quantize.QModule(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_checkpoint_sequential():
    torch.manual_seed(1)
    plain = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))])
    model = quantize.QModule(plain, quantize.ActivationConfig(bits=8, max_bits=8))
    x = torch.randn(8, 16)
    torch.manual_seed(2)
    checkpoint_sequential(model, 3, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(2)
    for layer in model:
        x = layer(x)
    x.sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_the_whole_model_under_checkpoint():
    model = quantize.QModule(nn.Sequential(Block(), nn.ReLU(True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 3)))
    x = torch.randn(4, 4, 8, 8)
    for reentrant in (False, True):
        for _ in range(3):
            checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("reentrant", "learns"), [(None, True), (False, True), (True, False)])
def test_where_bits_learn(reentrant, learns):
    # As QModule's docstring says. Three samples: both forwards must round their bits alike.
    body = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    model, x = quantize.QModule(Checkpointed(body, reentrant), quantize.ActivationConfig(bits=2.5)), torch.randn(3, 64)
    for _ in range(4):
        gradients(model, x)
    assert {state["updates"] for state in model.activation_state().values()} == {4 if learns else 0}
