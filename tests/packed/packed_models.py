"""Small models that the tests of this room share."""

import contextlib

import torch
from torch import nn

from quantize.packed.convert import convert
from quantize.packed.region import region_of
from quantize.weight.prepare import prepare


class Residual(nn.Module):
    """Two convolutions with batch norms, one of whose outputs is used twice."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        return self.fc((self.bn2(y) + y + x).mean((2, 3)))


class PaddedConv(nn.Conv2d):
    """With a forward of its own, which reads its weight."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        return self.mlp(self.attn(x, x, x)[0])


class Tied(nn.Module):
    """An embedding with the weight of the last of two linear layers that share theirs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 12, bias=False)
        self.head = nn.Linear(8, 12)
        self.inner.weight = self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x)) + self.inner(self.embedding(x))


def warm(model, *shape):
    """Batch norms with statistics and affine parameters that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def packed_of(model, config, *batch):
    """(prepared, packed); activation quantizers start from `batch`."""
    prepared = prepare(warm(model), config)
    if batch:
        with torch.no_grad():
            prepared(*batch)
    return prepared, convert(prepared)


@contextlib.contextmanager
def inside(model):
    """As in the forward of a converted `model`, for parts that are called by hand."""
    region = region_of(model)
    region.enter()
    try:
        yield
    finally:
        region.leave()
