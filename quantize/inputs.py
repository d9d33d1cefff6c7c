"""Why a layer refuses its input, in words: asked only when PyTorch or an op has refused it, so that it costs nothing before."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_SIZES = ("", "L", "H, W", "D, H, W")  # by the number of spatial dimensions


def names_refusals(forward):
    """Decorator of a layer's forward(input, ...): raises :func:`refusal`'s error in the place of one that does not name the input."""

    @functools.wraps(forward)
    def run(self, input, *args, **kwargs):
        try:
            return forward(self, input, *args, **kwargs)
        except Exception as error:
            named = refusal(self, input)
            if named is None:
                raise
            raise named from error

    return run


def refusal(layer: nn.Module, input) -> TypeError | ValueError | None:
    """The error that names what is wrong with `input` for `layer` (its class has `plain`, the nn class that it stands for), or None where
    the input fits and something else is the matter."""
    if isinstance(input, fx.Proxy):  # a symbolic trace, which stops by errors of its own
        return None
    if not isinstance(input, Tensor):
        return TypeError(f"{_name(layer)}: input must be a Tensor; got {type(input).__name__}")
    weight = layer._parameters.get("weight")  # packed layers, whose output has the input's dtype, have none
    weighted = issubclass(layer.plain, (_ConvNd, nn.Linear, _BatchNorm)) and not (weight is not None and weight.is_complex())
    if weighted and not input.is_floating_point():
        return TypeError(f"{_name(layer)}: input must be a floating-point Tensor; got {_dtype(input.dtype)}")
    casts = input.dtype != torch.float64 and input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
    if weight is not None and not issubclass(layer.plain, _BatchNorm) and input.dtype != weight.dtype and not casts:
        return TypeError(f"{_name(layer)}: input must be {_dtype(weight.dtype)}, as the weight is; got {_dtype(input.dtype)}")
    expected = _misfit(layer, tuple(input.shape))
    return ValueError(f"{_name(layer)}: input must be {expected}; got {list(input.shape)}") if expected else None


def _name(layer: nn.Module) -> str:
    """Kind, and place in the model where that is known."""
    state = getattr(layer, "_state", None)
    name = getattr(layer, "placed", "") if state is None else state.name
    return f"{type(layer).__name__} {name!r}" if name else type(layer).__name__


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _misfit(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """What the shape should have been; empty where it fits, or the layer has no rule here."""
    if issubclass(layer.plain, _ConvNd):
        return _conv_misfit(layer, shape)
    if issubclass(layer.plain, nn.Linear):
        return "" if shape[-1:] == (layer.in_features,) else f"[*, {layer.in_features}]"
    if issubclass(layer.plain, _BatchNorm):
        ranks = _RANKS.get(layer.plain)
        fits = (len(shape) in ranks if ranks else len(shape) >= 2) and shape[1] == layer.num_features
        forms = [", ".join(("N", str(layer.num_features), _SIZES[rank - 2])).rstrip(", ") for rank in ranks or ()]
        return "" if fits else " or ".join(f"[{form}]" for form in forms) or f"[N, {layer.num_features}, *]"
    n = getattr(layer, "spatial", 0)  # of pools
    return "" if not n or len(shape) in (n + 1, n + 2) else f"[N, C, {_SIZES[n]}] or [C, {_SIZES[n]}]"


def _conv_misfit(layer: nn.Module, shape: tuple[int, ...]) -> str:
    n, channels = len(layer.kernel_size), layer.in_channels
    if len(shape) not in (n + 1, n + 2) or shape[-n - 1] != channels:
        return f"[N, {channels}, {_SIZES[n]}] or [{channels}, {_SIZES[n]}]"
    if issubclass(layer.plain, _ConvTransposeNd) or layer.padding == "same":
        return ""
    padding = (0,) * n if layer.padding == "valid" else layer.padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(layer.kernel_size, layer.dilation, padding, strict=True)]
    if all(size >= enough for size, enough in zip(shape[-n:], least, strict=True)):
        return ""
    return f"at least {' x '.join(map(str, least))} in its last {n} dimensions, as large as the kernel with the padding"
