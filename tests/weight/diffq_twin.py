"""DiffQ's ops in plain PyTorch, Philox included, and what its tests draw."""

import math

import torch
from philox_twin import WORD, philox4x32
from same_bits import patterns

ops = torch.ops.quantize
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([0x123456789ABCDEF, 0x7FEDCBA987654321])
GROUPS = [1, 3, 4, 8, 16, 17, 0]  # 0: the whole tensor
SHAPES = [(1,), (1, 7), (3, 9), (3, 683), (2, 2500)]  # 2,049 and 5,000: two and three pieces of 2,048, the latter with rows across
SPANS = ["channel", "tensor", "group"]


def noise(n, stream, seed=SEED, quantiles=None):
    """float64 [n]: sixteen counters for 256 elements; element i has half i / 16 % 8 of counter i % 16, from 128 on its bytes exchanged."""
    key, offset = seed.tolist()
    i = torch.arange(n)
    words = philox4x32((i // 256 * 16 + i % 16, torch.full_like(i, stream), offset & WORD, offset >> 32), (key & WORD, key >> 32))
    slot = i % 128 // 16
    u = torch.stack(words)[slot // 2, i] >> (16 * (slot % 2)) & 0xFFFF
    u = torch.where(i % 256 < 128, u, (u << 8 | u >> 8) & 0xFFFF)
    return (u.double() + 0.5) / 65536 - 0.5 if quantiles is None else quantiles.double()[u]


def each(values, size, n):
    """A value for each of n elements of which `size` in a row share one."""
    return values.repeat_interleave(size)[:n]


def extents(flat, span):
    """(low, range) of every `span` elements, [rows]; gradients go to the lowest and the highest, the first of equals."""
    whole = len(flat) // span * span
    ends = []
    for find in (torch.argmin, torch.argmax):
        rows = [part for part in (flat[:whole].view(-1, span), flat[whole:].view(1, -1)) if part.numel()]
        ends.append(torch.cat([row.gather(1, find(row.detach(), 1, keepdim=True))[:, 0] for row in rows]))
    return ends[0], ends[1] - ends[0]


def bits_of(logits, low, high):
    return low + (high - low) * logits.double().sigmoid()


def rounded_bits_of(logits, low, high):
    return bits_of(logits, low, high).round().clamp(math.ceil(low), math.floor(high))


def with_noise(w, logits, group_size, span, low, high, stream=0, seed=SEED, quantiles=None):
    """float64, of w's shape."""
    flat = w.double().flatten()
    n = len(flat)
    scale = 1 / (2 ** bits_of(logits, low, high) - 1)
    y = flat + each(extents(flat, span)[1], span, n) * each(scale, group_size, n) * noise(n, stream, seed, quantiles)
    return y.view(w.shape)


def on_grid(w, logits, group_size, span, low, high):
    """(y, steps) of w's shape in float32 throughout, as the op has it: rounding to a level is decided to the last bit."""
    flat = w.float().flatten()
    n = len(flat)
    base, extent = (each(part, span, n) for part in extents(flat, span))
    most = each(2 ** rounded_bits_of(logits, low, high) - 1, group_size, n).float()
    step = extent / most
    code = torch.where(step > 0, (flat - base) / step, 0).round().clamp(min=torch.zeros(()), max=most)
    return (base + code * step).to(w.dtype).view(w.shape), step.view(w.shape)


def sizes(shape, group_size, span):
    """(group_size, span) in elements."""
    n = math.prod(shape)
    size = group_size or n
    return size, {"channel": n // shape[0], "tensor": n, "group": size}[span]


def sample(shape, group_size, dtype=torch.float32):
    """(w, logits), with logits over all of the bits."""
    n = math.prod(shape)
    w = (torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.1).to(dtype)
    return w, torch.randn(-(-n // (group_size or n))) * 3


def call(op, w, logits, group_size, span, low=2.0, high=15.0, stream=0, seed=SEED, quantiles=None):
    """ops.diffq or ops.diffq_on_grid for one weight."""
    if op is ops.diffq:
        return op([w], [logits], seed, [stream], [group_size], [span], [low], [high], quantiles)[0][0]
    return op([w], [logits], [group_size], [span], [low], [high])[0]


def backward(grads, *rest):
    """(gradients of the weights, of the logits): the op changes the former in place."""
    changed = [grad.clone() for grad in grads]
    grad_logits = ops.diffq_backward_(changed, *rest)
    kept = [grad.clone() for grad in grads]
    for got, want in zip(ops.diffq_backward(grads, *rest), (changed, grad_logits), strict=True):
        assert all(torch.equal(patterns(a), patterns(b)) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(patterns(a), patterns(b)) for a, b in zip(grads, kept, strict=True))
    return changed, grad_logits


def gradients(function, w, logits, grad):
    w, logits = w.detach().clone().requires_grad_(), logits.detach().clone().requires_grad_()
    return torch.autograd.grad(function(w, logits), (w, logits), grad)


def batch(dtype=torch.float32):
    """Arguments of ops.diffq for weights of several shapes, groups, spans and bounds."""
    shapes, groups = [(3, 9), (2, 5000), (1,), (40, 7), (5, 4100)], [8, 16, 1, 3, 0]
    spans = ["channel", "tensor", "group", "group", "channel"]
    pairs = [sample(shape, size, dtype) for shape, size in zip(shapes, groups, strict=True)]
    both = [sizes(*each_of) for each_of in zip(shapes, groups, spans, strict=True)]
    low, high = [2.0, 1.0, 2.5, 3.0, 2.0], [15.0, 16.0, 4.5, 3.0, 8.0]
    return [w for w, _ in pairs], [own for _, own in pairs], SEED, [3, 1, 4, 1, 5], [a for a, _ in both], [b for _, b in both], low, high
