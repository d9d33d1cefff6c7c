"""Which batch norms can go into the layer before them, and what they do to it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .affine import affine_of
from .plain import shell
from .trace import Calls, collected, hooked_around, unwatched

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def find_pairs(model: nn.Module, names: set[str]) -> list[tuple[str, str]]:
    """(layer, batch norm) by module name, for layers among `names`: those whose weight is going to be packed.

    A pair is folded only if there is one call each, and nobody but the batch norm sees what the layer computes. The model must be in
    eval mode, without compressed layers' classes. Nothing of it changes.
    """
    copied = shell(model, "convert")
    candidates = {copied.get_submodule(name): name for name in names}
    norms = {m: name for name, m in copied.named_modules() if type(m) in BATCH_NORMS}
    allowed, around = unwatched(copied, {*candidates, *norms}), hooked_around(copied)
    return [
        (candidates[layer], norms[norm])
        for layer, norm in collected(copied, {*candidates, *norms}, _graph_pairs)
        if layer in allowed & set(candidates) and norm in allowed & set(norms) and around[layer] == around[norm]
    ]


def _graph_pairs(root: nn.Module, graph: fx.Graph) -> list[tuple[nn.Module, nn.Module]]:
    calls, pairs = Calls(root, graph), []
    for node in calls.nodes:
        norm = calls.link(node)
        layer = None if norm is None else calls.alone(node.args[0])
        if layer is not None and len(node.args[0].users) == 1:
            pairs.append((layer, norm))
    return pairs


def scale_and_shift(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor] | None:
    """What the batch norm does to a channel in evaluation, float64: x * scale + shift. None where it cannot be folded."""
    tensors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if norm.running_mean is None or norm.num_features != channels or any(t is not None and t.dtype != torch.float32 for t in tensors):
        return None
    scale, shift = affine_of(norm)
    return (scale, shift) if scale.isfinite().all() and shift.isfinite().all() else None
