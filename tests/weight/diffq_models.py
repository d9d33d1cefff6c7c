"""Models and helpers of the tests of learned bits."""

import torch
from torch import nn

from quantize import DiffQ
from quantize.weight.diffq import diffq_quantizers

ops = torch.ops.quantize
MIB = 1 << 20
COARSE = DiffQ(group_size=4, init_bits=3)  # noise that shows


class Net(nn.Module):
    """Convolutions of four kinds, a norm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.one = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = self.depthwise(self.norm(self.conv(x)).relu())
        return self.fc(self.one(self.up(x)).relu().mean((2, 3)))


def images(n=4):
    return torch.randn(n, 3, 6, 6)


def quantizers(model):
    return list(diffq_quantizers(model))


def logits_of(model):
    return [q.logits for q in quantizers(model)]


def at_rest(model):
    """Nothing of a forward pass is left behind."""
    return all(q.ready is None and q.beginner is None for q in quantizers(model))


def gradients(model, x, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


class Cell(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.cell = cls(5, 4)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class First(nn.Module):
    """The first of what a recurrent layer returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x):
        return self.again(self.b(self.a(x)))
