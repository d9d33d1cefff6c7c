"""PyTorch's own table of modules with sample inputs: unbatched inputs, empty ones, keyword arguments and return_indices are in it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import quantize
from quantize import ActivationConfig
from quantize.activation.state import override

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's own: lazy modules, even kernels, nested tensors

# A mean over few numbers may amplify 8-bit noise without bound: a batch norm over two values, for one, is a sign.
AMPLIFY = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
# Gradients here are what a row's or an attention's means leave of the output's, a ramp: small beside it, where noise is not. Their mean is
# compared, over DRAWS of it.
NOISY = {
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Softmax,
    nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer, nn.Transformer,
}  # fmt: skip
DRAWS = 12
# Of three tokens one may have all the weight: of the others' 1e-4, 8 bits make nothing or, once in forty draws, fifty times as much.
RARE = {nn.MultiheadAttention}


class Holder(nn.Module):
    """The module as a part of a model: its own class and calls, not the root's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def fresh(value):
    """A leaf of its own of each tensor: some samples are views or results."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def step(module, sample, seed=0):
    """Outputs and gradients of one forward and backward; dropout's numbers are the same in each, and packing's for the same seed."""
    module.zero_grad()
    args, kwargs = tree_map(fresh, (sample.forward_input.args, sample.forward_input.kwargs))
    torch.manual_seed(0)
    with override(generator=torch.Generator().manual_seed(seed)):
        outputs = [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    terms = [(t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs if t.requires_grad]
    if terms:
        sum(terms).backward()
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return [t.detach() for t in outputs], [t.grad for t in [*module.parameters(), *inputs]]


def assert_same(got, expected):
    """Bit for bit."""
    assert [t is None for t in got] == [t is None for t in expected]
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_near(got, expected):
    """Within what 8 bits may do to a gradient."""
    assert [t is None for t in got] == [t is None for t in expected]
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            a, b = a.nan_to_num(), b.nan_to_num()
            assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


def assert_mean_near(draws, expected):
    """Likewise their mean: what its own noise, at five deviations, leaves of the difference."""
    for parts in zip(*draws, expected, strict=True):
        *parts, b = parts
        assert [t is None for t in parts] == [b is None] * len(parts)
        if b is not None:
            parts = torch.stack(parts).nan_to_num()
            off = (parts.mean(0) - b.nan_to_num()).norm()
            assert off <= 5 * (parts.var(0).sum() / len(parts)).sqrt() + 0.02 * b.nan_to_num().norm() + 1e-6


def build(info, sample, dtype, training):
    torch.manual_seed(0)
    return info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).to(dtype).train(training)


def converted(module, **config):
    return quantize.QModule(copy.deepcopy(module), ActivationConfig(**config))


def check_near(kind, module, ours, gradients, sample):
    """8 bits of a module of class `kind`, of which `ours` is the first step."""
    if kind in NOISY:
        ours = converted(module, bits=8)
        assert_mean_near([step(ours, sample, seed)[1] for seed in range(DRAWS)], gradients)
    elif kind not in AMPLIFY | RARE:
        assert_near(ours[1], gradients)


def check(module, sample):
    """`module` as a whole model: off, at 8 bits, and through two steps of adaptive bits."""
    outputs, gradients = step(copy.deepcopy(module), sample)
    same = step(converted(module, enabled=False), sample)
    assert_same(same[0], outputs)
    assert_same(same[1], gradients)
    near = step(converted(module, bits=8), sample)
    assert_same(near[0], outputs)
    check_near(type(module), module, near, gradients, sample)
    adaptive = converted(module, bits=2)
    for _ in range(2):
        far = step(adaptive, sample)
        assert [t is None for t in far[1]] == [t is None for t in gradients]
    if not any(m.training and type(m) in AMPLIFY for m in module.modules()):  # whose second step starts from other statistics
        assert_same(far[0], outputs)


def check_part(module, sample, exact):
    """`module` as a part of a model."""
    module = Holder(module)
    outputs, gradients = step(copy.deepcopy(module), sample)
    ours = step(converted(module, bits=8), sample)
    assert_same(ours[0], outputs)
    if exact:
        assert_same(ours[1], gradients)
    else:
        check_near(type(module.inner), module, ours, gradients, sample)


CASES = [(info, training) for info in module_db for training in ((True, False) if info.train_and_eval_differ else (True,))]


@pytest.mark.parametrize(("info", "training"), CASES, ids=[f"{info.name}-{'train' if training else 'eval'}" for info, training in CASES])
def test_module(info, training):
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
            module = build(info, sample, dtype, training)
            check_part(module, sample, exact=dtype == torch.float64)  # which is kept as it is
            if dtype == torch.float32 and not info.is_lazy:  # a lazy module changes its class at its first call, and is then no QModule
                check(module, sample)
