"""Products of two activations, and the softmax between those of an attention that is written out.

As in functional.py, `plain` is the namesake with its arguments, called where nothing is compressed; `state` is called where something is.
Bits do not adapt here: what noise in these does to parameters is not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation.config import op_group_size
from ..dtypes import FLOATS
from .autocast import lowered, raised
from .functional import compressible, saves, stored, tracks

# Of a softmax's output p: its gradient p * (g - sum(g * p)) is not linear in p, so noise biases it, by the noise's variance over p.
SOFTMAX_BITS = 8


def keeps_both(a, b) -> bool:
    """Whether a product of the two would keep both, each of its own size: expanded ones are smaller as they are."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.device != b.device:
        return False
    return all(tracks(t) and compressible(t) is None and stored(t) == t.numel() for t in (a, b))


def multiply(state, a: Tensor, b: Tensor, *, plain) -> Tensor:
    """a * b of equal sizes, where both have gradients: each is packed, for the other's."""
    if not keeps_both(a, b) or a.shape != b.shape or a.dtype != b.dtype:
        return plain()
    return _product(state, a, b, plain, matrices=False)


def square(state, x: Tensor, *, plain) -> Tensor:
    """x ** 2, with x packed."""
    if not keeps_both(x, x):
        return plain()
    return _product(state, x, x, plain, matrices=False)


def matmul(state, a: Tensor, b: Tensor, *, plain) -> Tensor:
    """a @ b of batches of matrices, where both have gradients."""
    if not keeps_both(a, b) or min(a.dim(), b.dim()) < 2 or max(a.dim(), b.dim()) < 3:  # one matrix by another: a weight, as a rule
        return plain()
    a, b = lowered(a, b)
    if a.dtype != b.dtype or a.shape[-1] != b.shape[-2]:
        return plain()
    return _product(state, a, b, plain, matrices=True)


def softmax(state, input: Tensor, dim: int | None, dtype: torch.dtype | None, *, plain) -> Tensor:
    """F.softmax, whose output is packed in SOFTMAX_BITS."""
    if not isinstance(input, Tensor) or compressible(input) is not None or not tracks(input) or type(dim) is not int:
        return plain()
    if input.dim() < 2 or not -input.dim() <= dim < input.dim() or (dtype is not None and dtype not in FLOATS):
        return plain()
    (input,) = (input.to(dtype),) if dtype is not None else raised("softmax.int", input)
    layer = state()
    if not saves(layer, input):
        return plain()
    layer.used = float(SOFTMAX_BITS)
    return torch.ops.quantize.softmax(input, dim, SOFTMAX_BITS, op_group_size(layer.config.group_size), layer.draw_seed())


def _product(state, a: Tensor, b: Tensor, plain, matrices: bool) -> Tensor:
    layer = state()
    if not saves(layer, a) or not saves(layer, b):
        return plain()
    bits = layer.fixed_bits()
    packed = [layer.pack_in(a, bits)]
    packed.append(packed[0] if b is a else layer.pack_in(b, bits))
    tensors = [t for p in packed for t in (p.codes, p.ranges, p.seed)]
    return torch.ops.quantize.product(a, b, matrices, tensors, [bits, bits], packed[0].group_size)
