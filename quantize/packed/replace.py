"""What becomes of a layer when its weight is packed: the changes in place that convert and load make."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..hooks import add_pre_hook, remove_hooks
from ..layers.base import CompressedLayer
from ..weight.prepare import quantize_input_of
from .grid import Grid
from .modules import PACKED, TENSORS, InputQuantizer, PackedLayer
from .plain import forward_of_its_own, plain_class
from .pools import PackedMaxPool2d
from .region import region_of
from .stems import PackedStemConv2d, is_stem
from .trace import containers
from .weight import PackedWeight


def packed_class(module: nn.Module) -> type[PackedLayer] | None:
    """The packed layer that `module` becomes. None where it reads its weight in a forward of its own."""
    return None if forward_of_its_own(module) else PACKED.get(plain_class(type(module)))


def taken_name(module: nn.Module) -> str | None:
    """An attribute of the float layer `module` that a packed one has for its own use."""
    if isinstance(module, PackedLayer):
        return None
    owners = (vars(module), module._buffers, module._parameters)
    return next((part for part in TENSORS if part != "bias" and any(part in owner for owner in owners)), None)


def reason_decoded(module: nn.Module) -> str:
    """Why `module` keeps a decoded weight."""
    return f"decoded: {plain_class(type(module)).__name__} reads a float weight in its own forward"


def become_packed(
    name: str, module: nn.Module, weight: PackedWeight, bias, dtype: torch.dtype, plain_bias: bool, grid: Grid | None, folded
) -> None:
    """A float or packed layer of that name becomes a packed one.

    `plain_bias`: the float layer has a bias. `folded`: (name, bytes) of the batch norm that scales and bias contain.
    """
    if (taken := taken_name(module)) is not None:
        raise ValueError(f"layer {name!r} must not have {taken!r} as an attribute of its own, which packed layers have; rename it")
    if isinstance(module, CompressedLayer):
        for attribute in ("config", "_explicit_config", "_state"):
            vars(module).pop(attribute, None)
    _set_input_grid(module, None)
    packed_class(module).become(module, weight, bias, dtype, plain_bias)
    if grid is not None:
        module.quantize_inputs(grid)
    module.folded, module.placed = folded, name


def become_decoded(module: nn.Module, tensor: str, weight: PackedWeight, dtype: torch.dtype, grid: Grid | None, memo: dict) -> None:
    """`module.<tensor>` becomes the decoded weight; what files store is in `module.packed_weights`. `memo` keeps ties."""
    if id(weight) not in memo:
        memo[id(weight)] = nn.Parameter(weight.decode().to(dtype), requires_grad=False)
    module._parameters[tensor] = memo[id(weight)]
    vars(module).setdefault("packed_weights", {})[tensor] = weight
    if isinstance(module, nn.RNNBase):  # which keeps a list of its own
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    if tensor == "weight":
        _set_input_grid(module, grid)


def feed(model: nn.Module, name: str, other: str, removed: Iterable[str], root: str) -> None:
    """PackedLayer.feed from the layer `name` of `model` to another, across the modules that were `removed` between them, as the trace of
    the module `root` has it."""
    seen = (*removed, *sorted(containers(name) ^ containers(other)))
    model.get_submodule(name).feed(other, model.get_submodule(other), map(model.get_submodule, seen), region_of(model.get_submodule(root)))


def mark_staying(module: nn.Module, tensor: str) -> None:
    """`module.<tensor>` was tied to a float parameter of another module, which keeps it."""
    vars(module).setdefault("staying", set()).add(tensor)


def _set_input_grid(module: nn.Module, grid: Grid | None) -> None:
    module._modules.pop("activation_quantizer", None)
    remove_hooks(module, lambda hook: hook is quantize_input_of)
    if grid is not None:
        spatial = len(getattr(module, "kernel_size", ()))
        module.activation_quantizer = InputQuantizer(grid, -spatial - 1).train(module.training)
        add_pre_hook(module, quantize_input_of, with_kwargs=True)


def become_identity(module: nn.Module) -> None:
    """What is left of a batch norm or an activation that went into the layer before or behind it."""
    module._parameters.clear()
    module._buffers.clear()
    module.__class__ = nn.Identity


def pool_without_indices(model: nn.Module) -> None:
    """Max pools compute values alone, which is all that inference needs."""
    for module in model.modules():
        if type(module) is nn.MaxPool2d and not forward_of_its_own(module):
            module.__class__ = PackedMaxPool2d


def filter_stems(model: nn.Module) -> None:
    """First convolutions that stay float go by minimal filtering."""
    for name, module in model.named_modules():
        if isinstance(module, PackedStemConv2d):  # of a model that was converted before
            for attribute in ("_steps", "_region", "_observers"):
                vars(module).pop(attribute, None)
        elif is_stem(module) and not forward_of_its_own(module):
            module.__class__ = PackedStemConv2d
        if isinstance(module, PackedStemConv2d):
            module.placed = name


FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def without_fused_path(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer's reads `weight` and `bias` of its linear layers and passes packed ones by; a hook prevents it.

    nn.TransformerEncoder makes nested tensors of padded inputs for it, which no other path takes.
    """
    for module in model.modules():
        if not isinstance(module, FUSED) or not any(
            isinstance(m, PackedLayer) or hasattr(m, "activation_quantizer") for m in module.modules()
        ):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            remove_hooks(module, lambda hook: hook is _nothing)
            add_pre_hook(module, _nothing)


def _nothing(module, args):
    return None


def float_bytes(module: nn.Module) -> int:
    """Bytes of the module's own parameters and buffers."""
    return sum(t.nbytes for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
