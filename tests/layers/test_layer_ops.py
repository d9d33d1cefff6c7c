"""torch.library.opcheck on every layer op, with inputs that require gradients; torch.compile of a model made of them."""

import pytest
import torch
from torch import nn
from torch.library import opcheck

import quantize
from quantize.__main__ import kernel_ops

ops = torch.ops.quantize
SEED = torch.tensor([3, 4])


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def packed(x, bits=2, group_size=64):
    """The arguments that ops with a packed input end with."""
    codes, ranges = ops.group_quantize(x.detach(), bits, group_size, SEED)
    return codes, ranges, None, bits, group_size, SEED, None


def conv(x, w, bias=True, stride=1, transposed=False, groups=1):
    n = x.dim() - 2
    out = w.shape[1] * groups if transposed else w.shape[0]
    bias = leaf(out) if bias else None
    return x, w, bias, [stride] * n, [1] * n, [1] * n, transposed, [0] * n, groups, *packed(x)


def normalized(x, mean, inverse_std):
    """Likewise, of a batch norm."""
    codes, ranges = ops.norm_quantize(x.detach(), mean, inverse_std, 2, 64, SEED)
    return codes, ranges, None, 2, 64, SEED, None


def conv_of_norm(x, w, mask=True):
    """The convolution of what a batch norm, and a ReLU, made of `x`."""
    c = x.shape[1]
    weight, bias = leaf(c), leaf(c)
    y, *statistics = ops.batch_norm_forward(x, weight, bias, None, None, True, 0.1, 1e-5)
    y, bits = ops.clip_and_mask(y, 0.0, float("nan"), 0.0) if mask else (y, None)
    tail = (*normalized(x, *statistics), weight.detach(), bias.detach(), bits)
    return y.requires_grad_(), w, None, [1] * 2, [1] * 2, [1] * 2, False, [0] * 2, 1, *tail


NOT_KEPT = (None, None, None, 0, 0, None, None)


def norm(x, training=True):
    c = x.shape[1]
    return x, leaf(c), leaf(c), torch.zeros(c), torch.ones(c), training, 0.1, 1e-5


def norm_made(x, training=True):
    """What batch_norm takes; its output is nobody else's."""
    _, weight, bias, *rest = arguments = norm(x, training)
    y, mean, inverse_std = ops.batch_norm_forward(*arguments)
    return x, y, weight, bias, inverse_std, training, *normalized(x, mean, inverse_std)


def several(inputs, bits):
    """Likewise of ops with several packed inputs."""
    tensors = []
    for x, b in zip(inputs, bits, strict=True):
        codes, ranges, _, _, _, seed, _ = packed(x, b, 16)
        tensors += [codes, ranges, seed]
    return tensors, bits, 16


def attention(*shape, mask=False):
    inputs = [leaf(*shape) for _ in range(3)]
    return *inputs, leaf(shape[-2], shape[-2]) if mask else None, 0.0, False, None, False, *several(inputs, (8, 8, 2))


def product(a, b, matrices):
    return a, b, matrices, *several((a, b), (2, 2))


SAMPLES = {  # of ops that write into their input, no leaves
    "conv": [
        lambda: conv(leaf(2, 3, 9), leaf(4, 3, 3)),
        lambda: conv(leaf(2, 4, 6, 7), leaf(4, 2, 3, 3), stride=2, groups=2, bias=False),
        lambda: conv(leaf(2, 4, 6, 7), leaf(4, 3, 3, 3), transposed=True),
    ],
    "linear": [
        lambda: ((x := leaf(5, 40)), leaf(3, 40), leaf(3), *packed(x)),
        lambda: ((x := leaf(2, 3, 20)), leaf(3, 20), None, *packed(x)),
    ],
    "batch_norm_forward": [lambda: norm(leaf(4, 3, 5, 5)), lambda: norm(leaf(4, 3, 20), training=False)],
    "batch_norm": [lambda: norm_made(leaf(4, 3, 5, 5)), lambda: norm_made(leaf(4, 3, 20), training=False)],
    "conv_of_norm": [
        lambda: conv_of_norm(leaf(4, 3, 6, 7), leaf(4, 3, 3, 3)),
        lambda: conv_of_norm(leaf(4, 3, 6, 7), leaf(4, 3, 1, 1), mask=False),
    ],
    "clip_and_mask": [lambda: (leaf(4, 9), 0.0, float("nan"), 0.0), lambda: (leaf(2, 3, 4, 4), -1.0, 1.0, 0.0)],
    "clip_and_mask_": [lambda: (leaf(4, 9).clone(), 0.0, float("nan"), 0.0)],
    "clip": [lambda: (leaf(4, 9), 0.0, float("nan"), 0.1), lambda: (leaf(2, 3, 4, 4), -1.0, 1.0, 0.0)],
    "clip_": [lambda: (leaf(4, 9).clone(), 0.0, float("nan"), 0.1), lambda: (leaf(2, 3, 4, 4).clone(), -1.0, 1.0, 0.0)],
    "dropout": [lambda: (leaf(4, 9), 0.3)],
    "max_pool": [lambda: (leaf(2, 3, 9, 9), [3, 3], [2, 2], [1, 1], [1, 1], False)],
    "max_pool_with_indices": [lambda: (leaf(2, 3, 9, 9), [3, 3], [2, 2], [1, 1], [1, 1], False)],
    "avg_pool": [lambda: (leaf(2, 3, 9, 9), [3, 3], [2, 2], [1, 1], False, True, None)],
    "adaptive_avg_pool": [lambda: (leaf(2, 3, 9, 9), [4, 2])],
    "pad": [lambda: (leaf(2, 3, 9, 9), [1, 2, 3, 0], "reflect"), lambda: (leaf(2, 3, 9), [1, 2], "replicate")],
    "mul": [lambda: ((x := leaf(2, 3, 9, 9)), leaf(2, 3, 1, 1), *packed(x)), lambda: ((x := leaf(2, 40)), leaf(40), *packed(x))],
    "mul_": [lambda: ((x := leaf(2, 3, 9, 9).clone()), leaf(2, 3, 1, 1), *packed(x))],
    "prelu": [
        lambda: ((x := leaf(2, 3, 9, 9)), leaf(3), *packed(x)),
        lambda: (leaf(2, 3, 9, 9), torch.ones(1), *NOT_KEPT),
    ],
    "layer_norm": [
        lambda: ((x := leaf(2, 3, 20)), [20], leaf(20), leaf(20), 1e-5, *packed(x)),
        lambda: ((x := leaf(2, 3, 20)), [3, 20], None, None, 1e-5, *packed(x)),
    ],
    "rms_norm": [
        lambda: ((x := leaf(2, 3, 20)), [20], leaf(20), 1e-5, *packed(x)),
        lambda: ((x := leaf(2, 3, 20)), [3, 20], None, None, *packed(x)),
    ],
    "group_norm": [
        lambda: ((x := leaf(2, 6, 5, 7)), 3, leaf(6), leaf(6), 1e-5, *packed(x)),
        lambda: ((x := leaf(2, 6)), 2, None, None, 1e-5, *packed(x)),
    ],
    "instance_norm": [
        lambda: ((x := leaf(2, 6, 5, 7)), leaf(6), leaf(6), None, None, 0.1, 1e-5, *packed(x)),
        lambda: ((x := leaf(2, 6, 9)), None, None, None, None, 0.1, 1e-5, *packed(x)),
    ],
    "product": [
        lambda: product(leaf(2, 5, 20), leaf(2, 5, 20), False),
        lambda: product(leaf(2, 5, 20), leaf(2, 20, 7), True),
        lambda: product(leaf(3, 1, 5, 20), leaf(2, 20, 7), True),
    ],
    "softmax": [lambda: (leaf(2, 5, 20), -1, 8, 16, torch.tensor([3, 4])), lambda: (leaf(2, 5, 20), 1, 2, 0, torch.tensor([3, 4]))],
    "attention": [lambda: attention(2, 3, 20, 8), lambda: attention(2, 20, 8, mask=True)],
    "smooth": [
        lambda: ((x := leaf(2, 3, 9, 9)), "silu", *packed(ops.smooth_derivative(x.detach(), "silu"))),
        *[lambda f=f: ((x := leaf(2, 3, 9)), f, *packed(x)) for f in ("sigmoid", "tanh", "elu", "softplus", "cube")],
    ],
    "smooth_": [lambda: ((x := leaf(2, 3, 9, 9).clone()), "silu", *packed(ops.smooth_derivative(x.detach(), "silu")))],
}


def test_every_layer_op_is_here():
    registered = {name.removeprefix("quantize::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("quantize::")}
    elsewhere = {"power_of_two", "fake_quantize", "lsq"}  # tests/weight/test_weight_ops.py
    elsewhere |= {"diffq", "diffq_on_grid", "diffq_total_bits", "clipped"}  # tests/weight/test_diffq.py, test_learned_activation.py
    elsewhere |= {"binarize", "dorefa", "sign_activation", "unit_activation", "quantize_gradient"}  # tests/weight/test_weight_ops.py
    assert registered - {name.split("::")[-1] for name in kernel_ops()} == set(SAMPLES) | elsewhere


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(op):
    for sample in SAMPLES[op]:
        opcheck(getattr(ops, op).default, sample())


def network(**config):
    c = {"config": quantize.ActivationConfig(**config)}
    return nn.Sequential(
        quantize.QConv2d(3, 8, 3, padding=1, **c), quantize.QBatchNorm2d(8, **c), quantize.QReLU(inplace=True), quantize.QMaxPool2d(2),
        quantize.QConv2d(8, 8, 3, padding="same", **c), quantize.QLeakyReLU(), quantize.QAdaptiveAvgPool2d(2), nn.Flatten(),
        quantize.QDropout(0.1), quantize.QLinear(32, 5, **c),
    )  # fmt: skip


@pytest.mark.parametrize(
    "config", [{"bits": 2, "max_bits": 2}, {"bits": 2, "max_bits": 8}, {"bits": 4, "max_bits": 4, "group_size": "sample"}]
)
def test_compiles_in_one_graph_and_draws_the_same_noise(config):
    model, x = network(**config), torch.randn(4, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def gradients(forward, seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(forward(x).square().sum(), list(model.parameters()))

    for seed in (1, 2):
        for a, b in zip(gradients(compiled, seed), gradients(model, seed), strict=True):
            torch.testing.assert_close(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(gradients(compiled, 1), gradients(compiled, 2), strict=True))


def test_a_compiled_model_trains():
    model, x, target = network(bits=2, max_bits=2), torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(compiled(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_converted_model_compiles():
    model = quantize.QModule(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
