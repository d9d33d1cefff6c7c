"""convert(): a prepared model's packed copy."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..weight.diffq import stop_drawing
from ..weight.lsq import ActivationQuantizer
from ..weight.prepare import PreparedWeight, prepared_weights
from ..weight.quantizer import WeightQuantizer
from .fold import find_pairs, scale_and_shift
from .form import GROUPED
from .modules import PackedLayer
from .plain import plain_class, refuse_wrappers, without_compression
from .replace import become_decoded, become_identity, become_packed, float_bytes, packed_class
from .weight import PackedWeight, conv_groups, is_transposed

SMALLEST_STEP = 2.0**-100  # what a step at zero or below counts as (csrc/weight/lsq.h)


def convert(model: nn.Module) -> nn.Module:
    """The packed, inference-only copy of a prepared model. `model` itself stays prepared and can be trained on.

    Prepared convolutions and linear layers become Packed layers, which hold codes and scales in place of the weight, and the fixed grid of
    their input where it is quantized. A batch norm that alone sees such a layer's output goes into its scales and bias and leaves an
    nn.Identity (the forward is traced for that, in eval mode; hooks, shared layers, other dtypes than float32 and DiffQ's
    range="group" prevent it). What else compressed training put in is taken out. Prepared weights of other modules (nn.MultiheadAttention,
    nn.LSTM, subclasses with a forward of their own) become decoded float weights, and are packed in files. A tied weight is packed once.

    Args:
        model: of :func:`quantize.prepare`, trained or not; activation quantizers must have seen data.

    Returns:
        The copy, in eval mode, with the float model's module names.

    Raises:
        TypeError: `model` is no nn.Module, or a wrapper (DistributedDataParallel, torch.compile, ScriptModule) around it.
        ValueError: nothing is prepared; a weight is NaN or infinite; an activation quantizer has not seen data; the weight has another
            parametrization after the quantizer. The layer is named.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> packed = quantize.convert(quantize.prepare(model, quantize.PowerOfTwo(4)))
        >>> packed[0].codes.shape, packed[1]
        (torch.Size([8, 16]), Identity())
        >>> torch.allclose(packed(x := torch.randn(2, 3, 8, 8)), model.eval()(x), atol=1e-5)
        True
    """
    return converted(model, "convert")


@torch.no_grad()
def converted(model: nn.Module, who: str, calibrated: bool = True) -> nn.Module:
    """As :func:`convert`; without `calibrated`, activation quantizers that have seen nothing will do (to count bytes)."""
    refuse_wrappers(model, who)
    if next(prepared_weights(model), None) is None:
        already = any(isinstance(m, PackedLayer) for m in model.modules())
        state = "it is converted already" if already else "no weight is"
        raise ValueError(f"{who}: model must be prepared by quantize.prepare; {state}")
    result = copy.deepcopy(model).eval()
    without_compression(result)
    stop_drawing(result)
    packs = _pack_all(result, who, calibrated)
    packable = {p.layer: p.module for p in packs if _packable(p.module, p.tensor)}
    pairs = dict(find_pairs(result, set(packable)))
    memo: dict[int, Tensor] = {}
    done = set()
    for prepared, weight in packs.items():
        if (id(prepared.module), prepared.tensor) in done:
            continue  # one module under two names
        done.add((id(prepared.module), prepared.tensor))
        quantizer = _input_quantizer(prepared.module)
        dtype = prepared.latent.dtype
        _remove_quantizer(prepared.module, prepared.tensor)
        if prepared.layer in packable:
            norm = result.get_submodule(pairs[prepared.layer]) if prepared.layer in pairs else None
            _fold_and_pack(prepared, weight, dtype, quantizer, norm, pairs.get(prepared.layer), memo)
        else:
            become_decoded(prepared.module, prepared.tensor, weight, dtype, quantizer, memo)
    return result


def _pack_all(model: nn.Module, who: str, calibrated: bool) -> dict[PreparedWeight, PackedWeight]:
    """Every prepared weight, packed; tied ones share the result."""
    packs, shared = {}, {}
    for prepared in prepared_weights(model):
        module, quantizer = prepared.module, prepared.quantizer
        chain = module.parametrizations[prepared.tensor]
        if chain[len(chain) - 1] is not quantizer:
            raise ValueError(f"{who}: the quantizer must be the last parametrization of {prepared.name!r}; remove those after it")
        own = getattr(module, "activation_quantizer", None)
        if calibrated and isinstance(own, ActivationQuantizer) and not own.initialized:
            raise ValueError(
                f"{who}: the activation quantizer of layer {prepared.layer!r} must have seen data; run a batch or quantize.calibrate"
            )
        latent = prepared.latent
        if not latent.isfinite().all():
            raise ValueError(
                f"{who}: {prepared.name!r} must be finite; got {int((~latent.isfinite()).sum())} values that are NaN or infinite"
            )
        transposed, groups = is_transposed(module), conv_groups(module)
        source = chain.original if len(chain) == 1 and chain.is_tensor else prepared
        learns = next(quantizer.parameters(), None) is not None  # and may have learned what another of this configuration has not
        key = (id(source), quantizer if learns else quantizer.config, transposed, groups)
        if key not in shared:
            shared[key] = _packed(quantizer, latent, transposed, groups)
        packs[prepared] = shared[key]
    return packs


def _packed(quantizer: WeightQuantizer, latent: Tensor, transposed: bool, groups: int) -> PackedWeight:
    config = quantizer.config
    if config.method == GROUPED:
        return PackedWeight.of_groups(config, quantizer.encode_groups(latent), tuple(latent.shape), transposed, groups)
    return PackedWeight.of_levels(config.method, config.weight_bits, *quantizer.encode(latent), transposed, groups)


def _packable(module: nn.Module, tensor: str) -> bool:
    return list(module.parametrizations) == ["weight"] and packed_class(module) is not None


def _input_quantizer(module: nn.Module) -> tuple[int, Tensor, Tensor] | None:
    own = getattr(module, "activation_quantizer", None)
    if not isinstance(own, ActivationQuantizer):
        return None
    return own.bits, own.step.detach().float().clamp(min=SMALLEST_STEP), own.zero_point.detach().float()


def _remove_quantizer(module: nn.Module, tensor: str) -> None:
    """torch's remove_parametrizations would take the property off the class, which the copy shares with the original."""
    del module.parametrizations[tensor]
    if len(module.parametrizations) == 0:
        del module._modules["parametrizations"]
        module.__class__ = plain_class(type(module))
    else:
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", tensor)}
        module.__class__ = type(type(module).__name__, type(module).__bases__, own)


def _fold_and_pack(prepared, weight, dtype, quantizer, norm, norm_name, memo) -> None:
    module = prepared.module
    plain, bias = module.bias, None
    if plain is not None:
        bias = memo.setdefault(id(plain), plain.detach().float().clone())
    folded = None
    if norm is not None and (affine := scale_and_shift(norm, weight.form.channels)) is not None:
        scaled = weight.scaled(affine[0])
        shifted = affine[1] if bias is None else bias.double() * affine[0] + affine[1]
        if scaled is not None and scaled.parts["scales"].isfinite().all() and shifted.isfinite().all():
            weight, bias, folded = scaled, shifted.float(), (norm_name, float_bytes(norm))
    become_packed(module, weight, bias, dtype, plain is not None, quantizer, folded)
    if folded is not None:
        become_identity(norm)
