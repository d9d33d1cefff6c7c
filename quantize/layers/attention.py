"""F.scaled_dot_product_attention whose query, key and value are kept packed; the backward makes the rest of them again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from ..activation.state import LayerState
from .autocast import lowered
from .functional import compressible, saves, tracks

# Of query and key, whatever the config says: the softmax is not linear in them, so noise biases it by about half a score's noise variance.
# At 8 bits that is 1e-4; at 2 it would be as large as the attention.
SCORE_BITS = 8


def attention(
    state, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, plain,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention; `state` is called where there is something to pack, `plain` where there is not."""
    inputs = (query, key, value)
    if not all(isinstance(t, Tensor) and compressible(t) is None and t.dim() > 2 for t in inputs) or not tracks(*inputs):
        return plain()
    mask_fits = attn_mask is None or (type(attn_mask) in (Tensor, Parameter) and attn_mask.device == query.device)
    *inputs, mask = lowered(*inputs, attn_mask)
    if not mask_fits or len({(t.dtype, t.device) for t in inputs}) > 1:
        return plain()
    layer: LayerState = state()
    if not all(saves(layer, t) for t in inputs):
        return plain()
    bits = (SCORE_BITS, SCORE_BITS, layer.fixed_bits())
    packed = [layer.pack_in(t, b) for t, b in zip(inputs, bits, strict=True)]
    layer.used = sum(t.numel() * b for t, b in zip(inputs, bits, strict=True)) / sum(t.numel() for t in inputs)
    tensors = [t for p in packed for t in (p.codes, p.ranges, p.seed)]
    return torch.ops.quantize.attention(*inputs, mask, dropout_p, is_causal, scale, enable_gqa, tensors, bits, packed[0].group_size)
