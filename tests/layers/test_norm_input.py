"""compress_once: the input of a convolution made of its batch norm's packed input, in the backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantize
from quantize import ActivationConfig, QModule

ops = torch.ops.quantize
ONCE = ActivationConfig(bits=2, max_bits=2, compress_once=True)


def block(relu=None, channels=16):
    return nn.Sequential(nn.BatchNorm2d(channels), relu or nn.ReLU(), nn.Conv2d(channels, 8, 3, bias=False))


def saved_by(model, x):
    """What is kept for the backward beside parameters and small tensors, by storage; and the output."""
    saved = {}

    def pack(t):
        if t.numel() > 32 and not any(t.data_ptr() == p.data_ptr() for p in model.parameters()):
            saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return list(saved.values()), y


def gradients(model, x):
    y = model(x)
    return torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])


class Functional(nn.Module):
    """A norm, a ReLU and a convolution as calls."""

    def __init__(self, channels=16):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.kernel = nn.Parameter(torch.randn(8, channels, 3, 3))

    def forward(self, x):
        return F.conv2d(F.relu(F.batch_norm(x, None, None, self.gain, self.shift, True)), self.kernel)


MADE = {
    "relu": block,
    "in place": lambda: block(nn.ReLU(inplace=True)),
    "leaky": lambda: block(nn.LeakyReLU(0.2)),
    "leaky, in place": lambda: block(nn.LeakyReLU(0.1, inplace=True)),
    "no relu": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, bias=False)),
    "not affine": lambda: nn.Sequential(nn.BatchNorm2d(16, affine=False), nn.ReLU(), nn.Conv2d(16, 8, 3)),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 3)),
    "transposed": lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3)),
    "functional": Functional,
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["relu", "in place", "no relu", "functional"])
def test_gradients_on_a_gpu(kind):
    x, plain = torch.randn(8, 16, 12, 12).cuda(), MADE[kind]().cuda()
    model = QModule(copy.deepcopy(plain), ActivationConfig(8, 8, compress_once=True))
    assert torch.equal(model(x), plain(x))
    for a, b in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm()) + 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", MADE)
def test_nothing_is_kept_for_the_convolution(kind, layout):
    if kind == "1d" and layout is not torch.contiguous_format:
        pytest.skip("flattened, it has strides that a batch norm does not keep")
    x = torch.randn(4, 16, 12, 12).contiguous(memory_format=layout).requires_grad_()
    plain = MADE[kind]()
    model = QModule(copy.deepcopy(plain), ONCE)
    saved, y = saved_by(model, x)
    assert torch.equal(y, plain(x))
    masks = 0 if kind == "no relu" else 1
    codes, ranges = x.numel() * 2 // 8, 4 * x.numel() // 256 // 2  # of the norm's input; int16 pairs, counted as elements below
    assert sorted(t.numel() for t in saved if t.dtype == torch.uint8) == sorted([codes] + [x.numel() // 8] * masks)
    assert all(t.dtype == torch.int16 and t.numel() <= ranges for t in saved if t.dtype != torch.uint8)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", MADE)
def test_gradients_are_unbiased(kind, mode):
    """400 draws: each entry of the mean within five of its standard errors, and all together, which are correlated, about one."""
    torch.manual_seed(0)
    x, plain = torch.randn(8, 16, 6, 6), MADE[kind]().train(mode == "train")
    want = torch.cat([g.flatten() for g in gradients(plain, x)])
    model = QModule(copy.deepcopy(plain), ONCE)
    draws = torch.stack([torch.cat([g.flatten() for g in gradients(model, x)]) for _ in range(400)]).double()
    errors = draws.std(0) / 400**0.5
    noisy = errors > 1e-6 * want.abs().max()
    z = ((draws.mean(0) - want) / errors)[noisy]
    assert noisy.float().mean() > 0.5  # the weights' and the norm's scale, not its shift
    assert z.abs().max() < 5 and 0.5 < float(z.square().mean()) < 2
    torch.testing.assert_close(draws.mean(0)[~noisy].float(), want[~noisy], rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("config", [ActivationConfig(8, 8, compress_once=True), ActivationConfig(6, 8, compress_once=True)], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_a_network_trains(config, amp):
    """ResNet's blocks: norms that feed convolutions, and sums that do not."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.a, self.b, self.relu = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.b(self.second(self.relu(self.a(self.first(x))))) + x)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model, x, target = QModule(copy.deepcopy(plain), config), torch.randn(32, 3, 12, 12), torch.arange(32) % 5

    def step(own):
        own.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(own(x), target)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in own.parameters()]), loss.item()

    want, got = step(plain)[0], step(model)[0]
    assert float(F.cosine_similarity(want, got, 0)) > (0.99 if amp or config.bits < 8 else 0.9999)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        losses.append(step(model)[1])
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    used = quantize.memory_report(model, x)
    assert used.saved_bytes < quantize.memory_report(QModule(copy.deepcopy(plain), ActivationConfig(config.bits, 8)), x).saved_bytes


def packings(model, x):
    """How many packed tensors are kept, and the output."""
    saved, y = saved_by(model, x)
    return sum(t.dtype == torch.int16 for t in saved), y


class Between(nn.Module):
    """Something between the norm and the convolution."""

    def __init__(self, between):
        super().__init__()
        self.norm, self.conv, self.between = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), between

    def forward(self, x):
        return self.conv(self.between(self.norm(x)))


BETWEEN = {
    "a sum": lambda y: F.relu(y) + 1,
    "a change in place": lambda y: y.mul_(2.0),
    "a pool": lambda y: F.max_pool2d(F.relu(y), 2),
    "a ReLU6": F.relu6,
    "a hardtanh": F.hardtanh,
    "a view": lambda y: F.relu(y)[:, :, 1:],
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_anything_else_is_packed(kind):
    x, plain = torch.randn(8, 16, 16, 16), Between(BETWEEN[kind])
    config = ActivationConfig(bits=8, max_bits=8, compress_once=True)
    model = QModule(copy.deepcopy(plain), config)
    count, y = packings(model, x)
    assert count == 2
    y.square().sum().backward()
    for p, g in zip(model.parameters(), gradients(plain, x), strict=True):
        assert float((p.grad - g).norm()) <= 0.02 * float(g.norm()) + 1e-3


@pytest.mark.parametrize(
    ("configs", "count"),
    [
        ({"*": ONCE}, 1),
        ({"0": ONCE, "2": ActivationConfig(4, 4, compress_once=True)}, 2),
        ({"0": ActivationConfig(2, 2), "2": ONCE}, 2),
        ({"0": None, "2": ONCE}, 1),
    ],
    ids=str,
)
def test_only_under_one_config(configs, count):
    found, y = packings(QModule(block(), configs), torch.randn(4, 16, 12, 12))
    assert found == count
    y.sum().backward()


def test_frozen_layers():
    x = torch.randn(4, 16, 12, 12)
    conv_frozen, norm_frozen, neither = block(), block().eval(), block().eval()
    conv_frozen[2].weight.requires_grad_(False)
    norm_frozen[0].requires_grad_(False)  # of fixed statistics: linear, and its input is not kept
    for plain, kept in ((conv_frozen, 1), (norm_frozen, 1), (neither, 1)):
        model = QModule(copy.deepcopy(plain), ActivationConfig(8, 8, compress_once=True))
        count, _ = packings(model, x)
        assert count == kept
        for a, b in zip(gradients(model, x), gradients(plain, x), strict=True):
            assert float((a - b).norm()) <= 0.02 * float(b.norm()) + 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", [ONCE, ActivationConfig(2, 8, compress_once=True)], ids=str)
def test_checkpointed_blocks_keep_no_more_than_their_inputs(config, reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(*block(), nn.Dropout(0.2))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    plain = Net()
    model, x = QModule(plain, config), torch.randn(4, 16, 12, 12, requires_grad=True)
    for _ in range(3):
        model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_both_read_the_packing_in_any_order():
    """Gradients of one layer alone, and of one loss after the other."""
    x, model = torch.randn(4, 16, 12, 12), QModule(block(), ONCE)
    y = model(x)
    (first,) = torch.autograd.grad(y.square().sum(), [model[0].weight], retain_graph=True)
    (second,) = torch.autograd.grad(y.square().sum(), [model[2].weight], retain_graph=True)
    both = torch.autograd.grad(y.square().sum(), [model[0].weight, model[2].weight])
    assert torch.equal(both[0], first) and torch.equal(both[1], second)


def test_layers_used_twice_in_one_forward():
    """Each use has its own input, and the sum of their gradients is unbiased as one is: compared at 8 bits."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.norm(self.conv(F.relu(self.norm(x))))))

    x, plain = torch.randn(4, 16, 12, 12), Twice()
    model = QModule(copy.deepcopy(plain), ActivationConfig(8, 8, compress_once=True))
    assert packings(model, x)[0] == 2
    for a, b in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm()) + 1e-2


def test_two_convolutions_of_one_relu():
    """Both read the norm's packing, and nothing else is kept."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            y = F.relu(self.norm(x))
            return self.a(y) + self.b(y)

    x, plain = torch.randn(4, 16, 12, 12), Fork()
    model = QModule(copy.deepcopy(plain), ActivationConfig(8, 8, compress_once=True))
    assert packings(model, x)[0] == 1
    for a, b in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm()) + 1e-2


def test_inputs_of_other_strides():
    x = torch.randn(4, 12, 16, 12)
    plain = block()
    for view in (x.transpose(1, 2), torch.randn(8, 16, 12, 12)[::2], torch.randn(16, 12, 12).expand(4, -1, -1, -1)):
        model = QModule(copy.deepcopy(plain), ActivationConfig(8, 8, compress_once=True))
        assert torch.equal(model(view), plain(view))
        for a, b in zip(gradients(model, view), gradients(plain, view), strict=True):
            assert float((a - b).norm()) <= 0.02 * float(b.norm()) + 1e-2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    """In the gradients that see it: of fixed statistics, so that it does not reach every output."""
    x, plain = torch.randn(4, 16, 12, 12), block().eval()
    x[1, 3, 5, 5] = value
    model = QModule(copy.deepcopy(plain), ActivationConfig(8, 8, compress_once=True))
    for layer in (model, plain):
        y = layer(x)
        (own,) = torch.autograd.grad(y[1].nan_to_num(0.0, 0.0, 0.0).sum(), [layer[2].weight])
        assert not own[:, 3].isfinite().all()


def test_empty_batches_and_single_values():
    model = QModule(block(), ONCE)
    y = model.eval()(torch.randn(0, 16, 12, 12))
    assert y.shape == (0, 8, 10, 10)
    y.sum().backward()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        QModule(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)), ONCE).train()(torch.randn(1, 16, 1, 1))
    one = QModule(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)), ONCE).eval()
    one(torch.randn(1, 16, 1, 1)).sum().backward()
    assert one[2].weight.grad.isfinite().all()


def test_bits_are_learned_of_both_consumers():
    """The packing belongs to the norm; the convolution's noise counts for it."""
    model, x = QModule(block(), ActivationConfig(2, 8, compress_once=True)), torch.randn(16, 16, 12, 12).requires_grad_()
    for _ in range(5):
        model(x).square().sum().backward()
    state = model.activation_state()
    assert state["0"]["updates"] == 5 and state["2"]["updates"] == 0 and state["2"]["elements"] == 0
    apart = QModule(block(), ActivationConfig(2, 8))
    apart.load_state_dict(model.state_dict())
    for _ in range(5):
        apart(x).square().sum().backward()
    assert state["0"]["curve"][0] > apart.activation_state()["0"]["curve"][0]


def test_config():
    with pytest.raises(TypeError, match="ActivationConfig: compress_once must be a bool; got 1"):
        ActivationConfig(compress_once=1)
