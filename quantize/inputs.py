"""Why a layer refuses its input, in words: asked only when PyTorch or an op has refused it, so that it costs nothing before."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_SIZES = ("", "L", "H, W", "D, H, W")  # by the number of spatial dimensions


class Unfinished:
    """Base of what stands for a tensor that is not computed yet. When it cannot be, the layer that it is the output of is to blame."""

    __slots__ = ()


def names_refusals(forward):
    """Decorator of a layer's forward(input, ...): raises :func:`refusal`'s error in the place of one that does not name the input."""

    @functools.wraps(forward)
    def run(self, input, *args, **kwargs):
        try:
            return forward(self, input, *args, **kwargs)
        except Exception as error:
            raise_named(error, self, input)

    return run


def raise_named(error: Exception, layer: nn.Module, input, handed_on: bool = False) -> None:
    """Raises what `input` has to do with `error`, or that itself."""
    named = refusal(layer, input, handed_on)
    if named is None:
        raise error
    raise named from error


def refusal(layer: nn.Module, input, handed_on: bool = False) -> TypeError | ValueError | None:
    """The error that names what is wrong with `input` for `layer`, or None where the input fits and something else is the matter.

    `handed_on`: uint8 is what the layer before makes for a packed one in the place of floats.
    """
    if isinstance(input, (fx.Proxy, Unfinished)):  # symbolic traces stop by errors of their own
        return None
    if not isinstance(input, Tensor):
        return TypeError(f"{name_of(layer)}: input must be a Tensor; got {type(input).__name__}")
    if input.is_nested or input.layout != torch.strided:
        found = "a nested one" if input.is_nested else input.layout
        return TypeError(f"{name_of(layer)}: input must be a dense Tensor; got {found}")
    try:
        handed_on = input.dtype == torch.uint8 and (handed_on or getattr(layer, "_fed", False))
        wrong = None if handed_on else _wrong_kind(layer, input)
        return wrong if wrong or not _takes_what_nn_takes(layer) else _wrong_shape(layer, _shape(layer, input, handed_on))
    except Exception:  # attributes that somebody has set to something else: then it is PyTorch's error
        return None


def name_of(layer: nn.Module) -> str:
    """Kind, and place in the model where that is known."""
    state, quantizer = getattr(layer, "_state", None), layer._modules.get("activation_quantizer")
    name = state.name if state is not None else getattr(layer, "placed", "") or getattr(quantizer, "layer_name", "")
    kind = type(layer).__name__.removeprefix("Parametrized")
    return f"{kind} {name!r}" if name else kind


def _takes_what_nn_takes(layer: nn.Module) -> bool:
    """Whether the forward is torch.nn's or ours. Another's may pad its input, or turn it."""
    return "forward" not in vars(layer) and type(layer).forward.__module__.partition(".")[0] in ("torch", __package__)


def _kind(layer: nn.Module) -> type:
    """The nn class that it stands for, or is."""
    return getattr(layer, "plain", type(layer))


def _own_tensor(layer: nn.Module) -> Tensor | None:
    """Whose device, and of float layers dtype, the input must have."""
    if "weight" in (chains := layer._modules.get("parametrizations", {})):
        return chains["weight"].original
    own = [layer._parameters.get("weight"), layer._buffers.get("codes"), layer._buffers.get("running_mean")]
    return next((t for t in own if t is not None), None)


def _wrong_kind(layer: nn.Module, input: Tensor) -> TypeError | ValueError | None:
    kind, own = _kind(layer), _own_tensor(layer)
    if not issubclass(kind, (_ConvNd, nn.Linear, _BatchNorm)):
        return None
    if not (input.is_floating_point() or (own is not None and own.is_complex())):
        return TypeError(f"{name_of(layer)}: input must be a floating-point Tensor; got {_dtype(input)}")
    if own is None:
        return None
    if own.is_floating_point() and own.dtype != input.dtype:
        doubles = torch.float64 in (own.dtype, input.dtype)
        casts = not doubles and input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
        if doubles or not (casts or issubclass(kind, _BatchNorm)):
            return TypeError(f"{name_of(layer)}: input must be {_dtype(own)}, as the weight is; got {_dtype(input)}")
    if own.device != input.device:
        return ValueError(f"{name_of(layer)}: input must be on {own.device}, as the weight is; got one on {input.device}")
    return None


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _shape(layer: nn.Module, input: Tensor, handed_on: bool) -> tuple[int, ...]:
    """As if `input` were floats."""
    if not handed_on or (input.dim() == 4 and not layer._fed):  # codes [N, C, H, W]
        return tuple(input.shape)
    if input.dim() == 2:  # bits [N, bytes]
        return len(input), layer.in_features
    return len(input), layer.in_channels, *input.shape[1:3]  # bits [N, H, W, bytes] or codes [N, H, W, 1, channels]


def _wrong_shape(layer: nn.Module, shape: tuple[int, ...]) -> ValueError | None:
    kind = _kind(layer)
    if issubclass(kind, _ConvNd):
        expected = _for_conv(layer, kind, shape)
    elif issubclass(kind, nn.Linear):
        expected = "" if shape[-1:] == (layer.in_features,) else f"[*, {layer.in_features}]"
    elif issubclass(kind, _BatchNorm):
        expected = _for_norm(layer, kind, shape)
    else:
        n = getattr(layer, "spatial", 0)  # of pools
        expected = "" if not n or len(shape) in (n + 1, n + 2) else f"[N, C, {_SIZES[n]}] or [C, {_SIZES[n]}]"
    return ValueError(f"{name_of(layer)}: input must be {expected}; got {list(shape)}") if expected else None


def _for_norm(layer: nn.Module, kind: type, shape: tuple[int, ...]) -> str:
    """What the shape should have been; empty where it fits."""
    ranks = next((ranks for norm, ranks in _RANKS.items() if issubclass(kind, norm)), None)
    if (len(shape) in ranks if ranks else len(shape) >= 2) and shape[1] == layer.num_features:
        return ""
    forms = [", ".join(("N", str(layer.num_features), _SIZES[rank - 2])).rstrip(", ") for rank in ranks or ()]
    return " or ".join(f"[{form}]" for form in forms) or f"[N, {layer.num_features}, *]"


def _for_conv(layer: nn.Module, kind: type, shape: tuple[int, ...]) -> str:
    n, channels = len(layer.kernel_size), layer.in_channels
    if len(shape) not in (n + 1, n + 2) or shape[-n - 1] != channels:
        return f"[N, {channels}, {_SIZES[n]}] or [{channels}, {_SIZES[n]}]"
    if issubclass(kind, _ConvTransposeNd) or layer.padding == "same":
        return ""
    padding = (0,) * n if layer.padding == "valid" else layer.padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(layer.kernel_size, layer.dilation, padding, strict=True)]
    if all(size >= enough for size, enough in zip(shape[-n:], least, strict=True)):
        return ""
    return f"at least {' x '.join(map(str, least))} in its last {n} dimensions, as large as the kernel with the padding"
