"""Batch norm over the samples of all processes, on any device and backend, with a packed normalized input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C
from ..activation.state import NOT_KEPT, LayerState
from .functional import compressible, draw_as_if_tracked, saves, tracks

_ops = torch.ops.quantize


def sync_batch_norm(
    state: LayerState | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group,
) -> Tensor:
    """Tensor[N, C, ...] normalised by the mean and variance over all processes' samples; N may differ and be 0 on some."""
    mean, variance, total = _statistics(input.detach(), running_mean, running_var, momentum, group)
    inverse_std, packed = (variance + eps).rsqrt(), None
    if state is not None and compressible(input) is None and tracks(input, weight, bias):
        packed = state.pack_normalized(input.detach(), mean, inverse_std)[0] if saves(state, input) else None
    elif state is not None:  # it synchronises in training alone
        draw_as_if_tracked(state, input, True)
    return _SyncBatchNorm.apply(
        input, weight, bias, mean, variance, inverse_std, total, eps, group, packed is not None, *(packed or NOT_KEPT)
    )


def _statistics(x: Tensor, running_mean, running_var, momentum: float, group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C] over all processes, and the values of a channel; the running ones are brought up to date."""
    channels, axes = x.shape[1], [d for d in range(x.dim()) if d != 1]
    count = x.numel() // channels
    # Each process sends its count, mean and sum of squared deviations; merged as Chan et al. do, which no cancellation spoils.
    local = torch.zeros(2 * channels + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    local[0] = count
    if count:
        variance, mean = torch.var_mean(x.to(local.dtype), axes, correction=0)
        local[1 : channels + 1], local[channels + 1 :] = mean, variance * count
    everyone = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, local, group=group)
    everyone = torch.stack(everyone)
    counts, means, squares = everyone[:, :1], everyone[:, 1 : channels + 1], everyone[:, channels + 1 :]
    total = counts.sum()
    if count <= 1 and int(total) <= 1:  # reads the device only where there can be too few
        raise ValueError(f"QSyncBatchNorm: input must have more than one value per channel over all processes; got {list(x.shape)}")
    mean = (counts * means).sum(0) / total
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((squares / (total - 1)).to(running_var.dtype), momentum)
    return mean, squares / total, total


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.view(1, -1, *([1] * (like.dim() - 2)))


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, mean, variance, inverse_std, total, eps, group, is_packed, codes, ranges, sample_bits, bits, group_size,
        seed, energy,
    ):  # fmt: skip
        ctx.group, ctx.shape, ctx.strides, ctx.dtype = group, x.shape, x.stride(), x.dtype
        ctx.packing, ctx.is_packed, ctx.energy = (bits, group_size), is_packed, energy
        kept = (codes, ranges, sample_bits, seed) if is_packed else (x, None, None, None)
        ctx.save_for_backward(*kept, weight, mean, inverse_std, total)
        if not x.numel():
            return x.clone()
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        first, ranges, sample_bits, seed, weight, mean, inverse_std, total = ctx.saved_tensors
        if ctx.is_packed:
            strides = _C.packed_strides(list(ctx.shape), list(ctx.strides))
            x = _ops.group_dequantize(first, ranges, sample_bits, *ctx.packing, ctx.shape, strides, ctx.dtype, seed)
            normalized = x.to(mean.dtype)
        else:
            normalized = (first.to(mean.dtype) - _per_channel(mean, first)) * _per_channel(inverse_std, first)
        g, axes = grad.to(mean.dtype), [d for d in range(grad.dim()) if d != 1]
        sums = torch.stack([g.sum(axes), (g * normalized).sum(axes)])
        grad_bias, grad_weight = sums[0].clone(), sums[1].clone()
        dist.all_reduce(sums, group=ctx.group)
        sums = sums / total
        centred = g - _per_channel(sums[0], g) - normalized * _per_channel(sums[1], g)
        scale = inverse_std if weight is None else inverse_std * weight
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = centred * _per_channel(scale, g) if needs_x else None
        if ctx.energy is not None and needs_x:
            _report(ctx.energy, g, grad_x, scale.square(), sums[1], total)
        return (
            grad_x.to(grad.dtype) if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *[None] * 14,
        )


def _report(energy: Tensor, g: Tensor, grad_x: Tensor, gain: Tensor, correlation: Tensor, total: Tensor) -> None:
    """csrc/layers/energy.h's figures, as csrc/layers/batch_norm_backward.cpp has them. The means are over all processes, the input gradient
    that the noise is compared with is this process's own, as are the energies of the layers before."""
    channels, spread = g.shape[1], g.shape[0] / g.numel()
    g2 = g.square().flatten(2).sum(2) if g.dim() > 2 else g.square()  # [N, C]
    energy[:, 0] = (g2 * (gain + 1)).sum(1) * spread
    direct = (gain * correlation.square()).sum() / channels
    through_mean = (g2 * gain).sum(1) * (spread / total)
    energy[:, 1] = (direct + through_mean) / grad_x.square().sum().clamp_min(1e-30)
