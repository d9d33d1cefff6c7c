"""convert(): a prepared model's packed copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..copies import copy_of
from ..weight.diffq import stop_drawing
from ..weight.dorefa import without_gradient_bits
from ..weight.lsq import ActivationQuantizer
from ..weight.prepare import PreparedWeight, prepared_weights
from ..weight.quantizer import SMALLEST_STEP, WeightQuantizer
from .chains import find_chains
from .fold import BATCH_NORMS, find_pairs, scale_and_shift
from .form import GROUPED
from .grid import Grid, SignGrid, StepGrid
from .modules import PackedLayer
from .plain import plain_class, refuse_wrappers, without_compression
from .replace import (
    become_decoded,
    become_identity,
    become_packed,
    feed,
    filter_stems,
    float_bytes,
    mark_staying,
    packed_class,
    pool_without_indices,
    without_fused_path,
)
from .signs import Path, find_paths
from .thresholds import of_affine
from .weight import PackedWeight, conv_groups, is_transposed


def convert(model: nn.Module) -> nn.Module:
    """The packed, inference-only copy of a prepared model. `model` itself stays prepared and can be trained on.

    Prepared convolutions and linear layers become Packed layers, which hold codes and scales in place of the weight, and the fixed grid of
    their input where it is quantized. A batch norm that alone sees such a layer's output goes into its scales and bias and leaves an
    nn.Identity (the forward is traced for that, in eval mode; hooks, also of a module around one of the two, shared layers, other dtypes
    than float32 and DiffQ's range="group" prevent it). Before inputs that become signs the batch norm goes into the signs' thresholds, with
    a ReLU before it and a clip behind it; a layer whose output nothing but such signs see hands on bits instead of floats. Where inputs are
    integers or signs, a residual sum and a ReLU, ReLU6 or Hardtanh right behind a convolution become part of it, and one whose output
    nothing but the next such convolution sees hands on 8-bit codes: the same results to the bit. A first convolution that stays float, with
    a large kernel in steps of two, goes by minimal filtering on CPUs, together with the batch norm, the ReLU and the max pool right behind
    it: other roundings.

    A BatchNorm1d behind an nn.Linear, or before one whose input becomes signs, is folded for two-dimensional inputs, and the layer refuses
    others; with a configuration of None it stays float and takes them.

    Hooks registered later, on a layer or on what is between it and the next, see floats, with folded batch norms in them; so does who
    calls a part of the copy by itself (``packed[:2]``). But a forward that takes another branch than when it was traced may meet bits
    where inputs are signs, or an output that waits for what comes behind it, and is computed when something else is done with it. A NaN
    becomes a number where inputs are integers or signs. Layers see when a buffer is replaced or changed, but not through ``buffer.data``.

    What else compressed training put in is taken out. Prepared weights of other modules (nn.MultiheadAttention, nn.LSTM, subclasses with a
    forward of their own) become decoded float weights, and are packed in files. A tied weight is packed once.

    Other threads may go on meanwhile, with this model too; random numbers that they draw during it may come again.

    Args:
        model: of :func:`quantize.prepare`, trained or not; activation quantizers must have seen data.

    Returns:
        The copy, in eval mode, with the float model's module names.

    Raises:
        TypeError: `model` is no nn.Module, or a wrapper (DistributedDataParallel, torch.compile, ScriptModule) around it.
        ValueError: nothing is prepared; a weight is NaN or infinite; an activation quantizer has not seen data; the weight has another
            parametrization after the quantizer; inputs that are to become signs come from a ReLU. The layer is named.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> packed = quantize.convert(quantize.prepare(model, quantize.PowerOfTwo(4)))
        >>> packed[0].codes.shape, packed[1]
        (torch.Size([8, 16]), Identity())
        >>> torch.allclose(packed(x := torch.randn(2, 3, 8, 8)), model.eval()(x), atol=1e-5)
        True
    """
    return converted(model, "convert")


@torch.inference_mode(False)  # whose tensors count no versions, by which layers see changes
@torch.no_grad()
def converted(model: nn.Module, who: str, calibrated: bool = True) -> nn.Module:
    """As :func:`convert`; without `calibrated`, activation quantizers that have seen nothing will do (to count bytes)."""
    refuse_wrappers(model, who)
    if next(prepared_weights(model), None) is None:
        already = any(isinstance(m, PackedLayer) for m in model.modules())
        state = "it is converted already" if already else "no weight is"
        raise ValueError(f"{who}: model must be prepared by quantize.prepare; {state}")
    result = copy_of(model, who).eval()
    without_compression(result)
    without_gradient_bits(result)
    stop_drawing(result)
    packs = _pack_all(result, who, calibrated)
    packable = {p.layer: p.module for p in packs if _packable(p.module, p.tensor)}
    signs = {p.layer: kind for p in packs if p.layer in packable and (kind := _sign_kind(p.module, p.quantizer)) is not None}
    paths = _paths(result, signs, who)
    removed = {name for path in paths.values() for name in path.removed}
    pairs = {layer: norm for layer, norm in find_pairs(result, set(packable)) if norm not in removed}
    grids = _sign_grids(result, signs, paths)
    float_parameters = {id(p) for m in result.modules() if not isinstance(m, ParametrizationList) for p in m._parameters.values()}
    memo: dict[int, Tensor] = {}
    done = set()
    for prepared, weight in packs.items():
        if (id(prepared.module), prepared.tensor) in done:
            continue  # one module under two names
        done.add((id(prepared.module), prepared.tensor))
        latent = prepared.latent
        grid = grids.get(prepared.layer) or _input_grid(prepared.module, latent.device)
        dtype, stays = latent.dtype, id(latent) in float_parameters
        _remove_quantizer(prepared.module, prepared.tensor)
        if prepared.layer in packable:
            norm = result.get_submodule(pairs[prepared.layer]) if prepared.layer in pairs else None
            _fold_and_pack(prepared, weight, dtype, grid, norm, pairs.get(prepared.layer), memo)
        else:
            become_decoded(prepared.module, prepared.tensor, weight, dtype, grid, memo)
        if stays:
            mark_staying(prepared.module, prepared.tensor)
    for path in paths.values():
        layer, source = result.get_submodule(path.layer), path.source and result.get_submodule(path.source)
        if (
            isinstance(source, PackedLayer)
            and type(source) is type(layer)
            and isinstance(source.grid, SignGrid)
            and source.spatial in (0, 2)
        ):
            feed(result, path.source, path.layer, path.removed, path.root)
    for name in removed:
        become_identity(result.get_submodule(name))
    without_fused_path(result)
    pool_without_indices(result)
    filter_stems(result)
    find_chains(result)
    return result


def _sign_kind(module: nn.Module, quantizer: WeightQuantizer) -> str | None:
    """Of a layer whose input and weight are one bit: "sign" or "unit" (grid.py)."""
    own = getattr(module, "activation_quantizer", None)
    kind = getattr(own, "kind", None)
    return kind if kind == "sign" or (kind == "unit" and own.bits == quantizer.config.weight_bits == 1) else None


def _paths(model: nn.Module, signs: dict[str, str], who: str) -> dict[str, Path]:
    """What stands before the signs and can go into their thresholds, by layer."""
    found, paths = find_paths(model, signs), {}
    for name, path in found.items():
        if path.constant:
            raise ValueError(
                f"{who}: the input of layer {name!r} must have both signs; it comes from a ReLU, is never below zero. "
                "Put a batch norm before the layer, or leave it in full precision"
            )
        norm, layer = model.get_submodule(path.norm), model.get_submodule(path.layer)
        inputs = layer.in_channels if hasattr(layer, "in_channels") else layer.in_features
        if not is_transposed(layer) and scale_and_shift(norm, inputs) is not None:
            paths[name] = path
    stay = {path.norm for name, path in found.items() if name not in paths}  # a norm goes only if all that see it can do without
    return {name: path for name, path in paths.items() if path.norm not in stay}


def _sign_grids(model: nn.Module, signs: dict[str, str], paths: dict[str, Path]) -> dict[str, SignGrid]:
    grids, counted = {}, set()
    for name, kind in signs.items():
        if name not in paths:
            grids[name] = SignGrid(1, kind)
            continue
        path = paths[name]
        norm = model.get_submodule(path.norm)
        threshold, flip = of_affine(*_as_computed(norm), kind, bool(path.relu))
        nbytes = 0 if path.norm in counted else float_bytes(norm)
        counted.add(path.norm)
        grids[name] = SignGrid(1, kind, threshold, flip, path.removed, nbytes)
    return grids


def _as_computed(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift in the float32 that PyTorch computes them in."""
    assert isinstance(norm, BATCH_NORMS)
    scale = (norm.running_var + norm.eps).sqrt().reciprocal()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def _has_seen_data(module: nn.Module, others: bool) -> bool:
    """`others`: whether some quantizer has, so that one with nothing but zeros is a dead layer's."""
    own = getattr(module, "activation_quantizer", None)
    return not isinstance(own, ActivationQuantizer) or own.has_started() or (own.zeros and others)


def _pack_all(model: nn.Module, who: str, calibrated: bool) -> dict[PreparedWeight, PackedWeight]:
    """Every prepared weight, packed; tied ones share the result."""
    packs, shared = {}, {}
    started = any(isinstance(m, ActivationQuantizer) and m.has_started() for m in model.modules())
    unseen = [] if not calibrated else [w.layer for w in prepared_weights(model) if not _has_seen_data(w.module, started)]
    if unseen:
        others = f" (and those of {', '.join(map(repr, unseen[1:]))})" if unseen[1:] else ""
        raise ValueError(
            f"{who}: the activation quantizer of layer {unseen[0]!r}{others} must have seen data; run a batch or quantize.calibrate. "
            "Where the model reads a layer's weight and never calls it, it needs a configuration without activation_bits"
        )
    for prepared in prepared_weights(model):
        module, quantizer = prepared.module, prepared.quantizer
        chain = module.parametrizations[prepared.tensor]
        if chain[len(chain) - 1] is not quantizer:
            raise ValueError(f"{who}: the quantizer must be the last parametrization of {prepared.name!r}; remove those after it")
        own = getattr(module, "activation_quantizer", None)
        latent = prepared.latent
        if latent.is_meta:
            raise ValueError(f"{who}: model must have its values in memory; {prepared.name!r} is on the meta device")
        if isinstance(own, ActivationQuantizer):
            for value in (own.step, own.zero_point):  # learned bits that are NaN count as the most
                if not value.isfinite().all():
                    raise ValueError(f"{who}: the activation quantizer of layer {prepared.layer!r} must be finite; got {own.step.item()}")
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


def _input_grid(module: nn.Module, device: torch.device) -> Grid | None:
    own = getattr(module, "activation_quantizer", None)
    if getattr(own, "kind", None) == "sign":
        return SignGrid(1, "sign")
    if getattr(own, "kind", None) == "unit":
        step = torch.full((), 1 / own.levels, dtype=torch.float32, device=device)
        return StepGrid(own.bits, step, torch.zeros_like(step))
    if not isinstance(own, ActivationQuantizer):
        return None
    return StepGrid(own.bits, own.step.detach().float().clamp(min=SMALLEST_STEP), own.zero_point.detach().float())


def _remove_quantizer(module: nn.Module, tensor: str) -> None:
    """torch's remove_parametrizations would take the property off the class, which the copy shares with the original."""
    del module.parametrizations[tensor]
    if len(module.parametrizations) == 0:
        del module._modules["parametrizations"]
        module.__class__ = plain_class(type(module))
    else:
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", tensor)}
        module.__class__ = type(type(module).__name__, type(module).__bases__, own)


def _fold_and_pack(
    prepared: PreparedWeight,
    weight: PackedWeight,
    dtype: torch.dtype,
    grid: Grid | None,
    norm: nn.Module | None,
    norm_name: str | None,
    memo: dict[int, Tensor],
) -> None:
    """Makes the layer a packed one, and the batch norm behind it, if any, part of it. `memo`: tied biases stay one tensor, by identity."""
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
    become_packed(prepared.layer, module, weight, bias, dtype, plain is not None, grid, folded)
    if folded is not None:
        become_identity(norm)
