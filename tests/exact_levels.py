"""Inputs that come back exactly from 8 bits, or as a batch norm normalizes them from one, so that lossy layers have the plain layers'
gradients; and a way to run both."""

import contextlib
import math

import torch

import quantize
from quantize.activation.state import LayerState

# With a range per sample, every tensor whose samples hold both ends of the grid below is stored exactly.
EXACT = quantize.ActivationConfig(bits=8, max_bits=8, group_size="sample")
LOW, STEP = -4.0, 1 / 32  # -4 to 3.96875, each number with at most 8 significant bits: bf16 and fp16 hold them too


def levels(*shape, dtype=torch.float32, unbatched=False):
    """Random numbers of the grid; every sample holds both ends."""
    x = LOW + STEP * torch.randint(256, shape)
    if x.numel():
        rows = x.view(1, -1) if unbatched or len(shape) == 1 else x.view(shape[0], -1)
        rows[:, 0], rows[:, -1] = LOW, LOW + 255 * STEP
    return x.to(dtype)


# Of values one above and one below their mean EPS makes a deviation of 2: they are normalized to one half and minus one half.
EPS = 3.0
ONE_BIT = quantize.ActivationConfig(bits=1, max_bits=1, group_size="sample")


def halves(*shape, dtype=torch.float32):
    """[N, C, ...]: in each channel as many values one above an integer of its own as one below it."""
    channels, others = shape[1], math.prod(shape) // shape[1]
    signs = torch.rand(channels, others).argsort(1) % 2 * 2.0 - 1
    x = (signs + torch.randint(-4, 5, (channels, 1))).view(channels, shape[0], *shape[2:])
    return x.transpose(0, 1).contiguous().to(dtype)


@contextlib.contextmanager
def exact_norms():
    """Sums of a channel are a bit off: within this, batch norms pack by a mean that is an integer and an inverse deviation of halves."""
    pack = LayerState.pack_normalized
    LayerState.pack_normalized = lambda state, x, mean, inverse_std: pack(state, x, mean.round(), (2 * inverse_std).round() / 2)
    try:
        yield
    finally:
        LayerState.pack_normalized = pack


def run(layer, x, *more, grad_scale=1.0):
    """(output, gradients of x and of the parameters, tensors saved by the forward). The output's gradient is the same in every run."""
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(leaf * 1 if getattr(layer, "inplace", False) else leaf, *more)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype) * grad_scale
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    return y, torch.autograd.grad(y, wanted, grad.to(memory_format=torch.preserve_format), allow_unused=True), saved


def twins(cls, *args, **kwargs):
    """The plain layer and ours, at exact bits or with ``config``, with the same parameters."""
    config = kwargs.pop("config", EXACT)
    plain = cls.plain(*args, **kwargs)
    ours = cls(*args, config=config, **kwargs)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def assert_same(ours, plain, x, *more, **tolerance):
    """Output equal, and its strides where x has samples outermost; gradients equal (or close, with a tolerance); buffers equal.

    Returns what ours saved.
    """
    y, grads, saved = run(ours, x, *more)
    expected, exact_grads, _ = run(plain, x, *more)
    if x.dim() == 0 or x.is_contiguous() or x.stride(0) == max(x.stride()):  # samples outermost
        assert y.stride() == expected.stride()
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert torch.equal(y.isnan(), expected.isnan())
    for got, want in zip(grads, exact_grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            torch.testing.assert_close(got, want, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
    return saved


def keeps(saved, layer, x):
    """What of `saved` is kept beside parameters: dtypes, for tensors of at least a sixteenth of x's elements."""
    own = {p.data_ptr() for p in [*layer.parameters(), *layer.buffers()]}
    return {t.dtype for t in saved if t.data_ptr() not in own and t.numel() * 16 >= x.numel() and t.dim() > 0}
