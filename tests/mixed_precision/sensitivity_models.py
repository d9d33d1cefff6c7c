"""Small models that the tests of this room share, and the long way to what is measured of them."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

import quantize
from quantize.weight.lsq import ActivationQuantizer, Observer


class Residual(nn.Module):
    """Convolutions with batch norms, with and without biases, one of whose outputs is used twice."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.dropout(x.mean((2, 3))))


class Exact(nn.Sequential):
    """Of small whole numbers, whose sums are exact in any order."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-3, 4, parameter.shape) / (64 if parameter.shape[0] == 4 else 1))


class Functional(nn.Module):
    """Everything but its layers by functions, some of them in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu_(self.first(x).sub_(0.1))  # what is left out must come back as it was
        y = F.gelu(self.second(x).mul_(0.7)).add_(x)
        y *= 0.5
        return self.last(y)


class Shared(nn.Module):
    """One ReLU at several places, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.relu(self.again(self.relu(self.again(self.relu(self.first(x)))))))


class WritesEarlier(nn.Module):
    """A module in place on what is used again beside it, so that leaving the call out would leave it unwritten."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        shortcut = self.first(x)
        x = self.relu(shortcut)
        return self.last(self.second(x) + shortcut)


class WritesInput(nn.Module):
    """Its first operation is in place on what it is given."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x.sub_(0.25).mul_(2)).relu())


class Several(nn.Module):
    """A module inside returns a tuple, another a dict; they take tuples and keywords."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(5, 8), nn.Linear(5, 8)

        def forward(self, x):
            return self.left(x), [self.right(x)]

    class Merge(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, pair, *, scale):
            return {"sum": self.inner(pair[0]) + scale * pair[1][0], "name": "merged"}

    def __init__(self):
        super().__init__()
        self.split, self.merge, self.last = Several.Split(), Several.Merge(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.merge(self.split(x), scale=0.5)["sum"].relu())


class Depends(nn.Module):
    """Calls other layers for other data."""

    def __init__(self):
        super().__init__()
        self.first, self.more, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        for _ in range(int(100 * float(x.sum())) % 3):
            x = self.more(x).relu()
        return self.last(x)


class BorrowsWeight(nn.Module):
    """A module inside uses a layer's weight before that is called, the model another's that is never called."""

    class Borrower(nn.Module):
        def __init__(self, owner):
            super().__init__()
            self.owner = [owner]  # no submodule

        def forward(self, x):
            return F.linear(x, self.owner[0].weight)

    def __init__(self):
        super().__init__()
        self.first, self.later, self.never, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.borrower = BorrowsWeight.Borrower(self.later)

    def forward(self, x):
        x = self.borrower(self.first(x)).relu()
        x = F.linear(x, self.never.weight, self.never.bias).relu()
        return self.last(self.later(x).relu())


class Checkpointed(nn.Module):
    """Recomputes its middle in training."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(checkpoint.checkpoint(self.middle, self.first(x).relu(), use_reentrant=False))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell, self.last = nn.LSTM(5, 6, num_layers=2, bidirectional=True), nn.GRUCell(12, 7), nn.Linear(7, 3)

    def forward(self, x):
        hidden = None
        for step in self.lstm(x.movedim(1, 0))[0]:
            hidden = self.cell(step, hidden)
        return self.last(hidden)


class Attention(nn.Module):
    """nn.MultiheadAttention, alone and in nn.TransformerEncoderLayer, samples first or second."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=batch_first)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(x)
        if not self.batch_first:
            x = x.movedim(1, 0)
        x = self.encoder(x + self.attention(x, x, x)[0])
        return self.last(x.mean(1 if self.batch_first else 0))


class Tied(nn.Module):
    """Two linear layers that share their weight, which is an embedding's, too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.inner, self.norm = nn.Linear(8, 12, bias=False), nn.LayerNorm(8)
        self.head, self.last = nn.Linear(8, 12), nn.Linear(12, 3)
        self.inner.weight = self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x).mean(1)
        return self.last((self.head(self.norm(x)) + self.inner(x)).relu())


class Keywords(nn.Module):
    """Takes keywords and returns an object with logits."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(5, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left=None, right=None, mode="sum"):
        assert mode == "product"
        return Keywords.Output(self.last((self.left(left) * self.right(right)).relu()))


def trained(model):
    """Batch norms with statistics and affine parameters that matter; in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(*sizes, side=6, classes=4):
    """A batch of each size."""
    return [(torch.randn(n, 3, side, side), torch.randint(classes, (n,))) for n in sizes]


def rows(*sizes, classes=3):
    return [(torch.randn(n, 5), torch.randint(classes, (n,))) for n in sizes]


def run(model, inputs):
    if isinstance(inputs, dict):
        return model(**copy.deepcopy(inputs))
    return model(*copy.deepcopy(inputs if isinstance(inputs, tuple) else (inputs,)))


@torch.no_grad()
def twin(model, chosen, batches):
    """A prepared copy in which the `chosen` {name: config} are quantized; their inputs' steps are set by the float model's activations."""
    plain, prepared = copy.deepcopy(model).eval(), quantize.prepare(copy.deepcopy(model).eval(), {"*": None, **chosen})
    for name in chosen:
        quantizer = getattr(prepared.get_submodule(name), "activation_quantizer", None)
        if isinstance(quantizer, ActivationQuantizer):
            observer = Observer()
            seen = plain.get_submodule(name).register_forward_pre_hook(lambda module, args, observer=observer: observer.observe(args[0]))
            for _ in range(2):
                for inputs, _ in batches:
                    run(plain, inputs)
                observer.advance()
            seen.remove()
            if observer.reached:
                quantizer.start(observer, "mse")
    return prepared


@torch.no_grad()
def logits_of(model, batches):
    """float64 [samples, classes] of all batches."""
    outputs = [run(model, inputs) for inputs, _ in batches]
    return torch.cat([getattr(output, "logits", output) for output in outputs]).double()


def kl(reference, logits):
    """Mean over samples, by the definition."""
    p, q = reference.softmax(1), logits.softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def loss_growth(targets):
    def growth(reference, logits):
        return float(F.cross_entropy(logits, targets) - F.cross_entropy(reference, targets))

    return growth
