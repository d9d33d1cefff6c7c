"""save() and load(): a converted model as one safetensors file."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from ..files import path_of, save_tensors
from ..weight.prepare import prepared_weights
from .chains import find_chains
from .contents import Contents, contents, packed_weights
from .grid import grid_of
from .header import DTYPES, Bad, layers_checksum, metadata_text, read_header, read_tensors
from .modules import PackedLayer
from .plain import refuse_wrappers
from .plan import Plan, Step, make_plan
from .replace import (
    become_decoded,
    become_identity,
    become_packed,
    feed,
    filter_stems,
    mark_staying,
    pool_without_indices,
    without_fused_path,
)
from .weight import PackedWeight


def save(model: nn.Module, path) -> None:
    """Writes a converted model to one safetensors file: packed codes, scales, and every other tensor of its state once.

    The file takes the place of an older one, with its permissions, only when it is complete; a symbolic link stays, and what it points to
    is replaced. The same model always gives the same bytes.

    Args:
        model: what :func:`quantize.convert` or :func:`quantize.load` returned.
        path: str or PathLike, of the file.

    Raises:
        TypeError: `model` is no nn.Module or a wrapper around it; `path` is no path.
        ValueError: `model` is not converted; a decoded weight was changed since; a state that is no tensor, or of a dtype that files lack;
            `path` is a pipe or the like.
        FileNotFoundError: the folder of `path` is not there.
        IsADirectoryError: `path` is a folder.

    Example:
        >>> import os, tempfile
        >>> model = quantize.convert(quantize.prepare(nn.Linear(64, 16), quantize.Uniform(4)))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> quantize.save(model, path)
        >>> quantize.load(nn.Linear(64, 16), path)
        PackedLinear(in_features=64, out_features=16, bias=True, method=uniform, bits=4)
    """
    refuse_wrappers(model, "save")
    _refuse_float(model)
    layers, items = storable(model)
    tensors = {name: item.tensor.detach().cpu().contiguous() for name, item in items.items()}
    save_tensors(tensors, metadata_text(layers, _checksum(layers, tensors)), path, "save")


def _checksum(layers: list[dict], tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), checksum)
    return layers_checksum(layers, checksum)


def _refuse_float(model: nn.Module) -> None:
    prepared = next(prepared_weights(model), None)
    if prepared is not None:
        raise ValueError(f"save: model must be converted; {prepared.name!r} is only prepared. Call quantize.convert first")
    if not any(isinstance(m, PackedLayer) or packed_weights(m) for m in model.modules()):
        raise ValueError("save: model must be converted; it has no packed weights. Call quantize.prepare and quantize.convert first")


def storable(model: nn.Module) -> Contents:
    """What save() writes, after the checks that need the model."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"save: the state of {name!r} must be tensors; {type(module).__name__} has an extra state")
        for part, weight in packed_weights(module).items():
            held = getattr(module, part)
            if not torch.equal(held.detach().cpu(), weight.decode().to("cpu", held.dtype)):
                raise ValueError(f"save: {part} of {name!r} must be what convert made it; it was changed since")
    found = contents(model, "save")
    for name, item in found.tensors.items():
        if item.tensor.dtype not in DTYPES.values() or item.tensor.layout != torch.strided:
            raise ValueError(f"save: {name!r} must be a dense tensor of {', '.join(DTYPES)}; got {item.tensor.dtype}, {item.tensor.layout}")
    return found


@torch.no_grad()
def load(model: nn.Module, path) -> nn.Module:
    """Makes a float model the packed one that was saved. In place: layers of the file become Packed layers, the rest gets its values.

    The file is compared with the model first, field by field, and nothing is allocated by what it merely claims; if anything is wrong
    the model stays as it was.

    Args:
        model: as defined, with the architecture that was prepared; weights do not matter. Or a converted one of that architecture.
        path: a file by :func:`quantize.save`.

    Returns:
        The same object, in eval mode; its outputs are bit-equal to the converted model's.

    Raises:
        TypeError: `model` is no nn.Module or a wrapper around it; `path` is no path. FileNotFoundError.
        ValueError: the model is prepared; the file is damaged, foreign or of another version (the field is named) or of another
            architecture (the first layer that differs is named).

    Example:
        >>> import os, tempfile
        >>> define = lambda: nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        >>> packed = quantize.convert(quantize.prepare(define(), quantize.PowerOfTwo(4)))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> quantize.save(packed, path)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(quantize.load(define(), path)(x), packed(x))
        True
    """
    refuse_wrappers(model, "load")
    path = path_of(path, "load")
    prepared = next(prepared_weights(model), None)
    if prepared is not None:
        raise ValueError(f"load: model must be the float definition; {prepared.name!r} is prepared")
    try:
        with open(path, "rb") as file, torch.inference_mode(False), torch.no_grad():
            header = read_header(file)
            plan = make_plan(model, header)
            tensors = read_tensors(file, header)
            weights = _weights(plan, tensors)
    except Bad as error:
        raise ValueError(f"load: {path}: {error}") from None
    _apply(model, plan, tensors, weights)
    return model.eval()


def _weights(plan: Plan, tensors: dict[str, Tensor]) -> list[PackedWeight]:
    """The packed weight of each step, its codes checked; on the model's device. Tied tensors stay tied."""
    placed: dict[tuple[str, torch.device], Tensor] = {}
    weights: dict[tuple, PackedWeight] = {}
    found = []
    for step in plan.steps:
        device = _device(step)
        for name in step.parts.values():
            placed.setdefault((name, device), tensors[name].to(device))
        parts = {part: placed[name, device] for part, name in step.parts.items()}
        key = (device, step.form, *(step.parts[part] for part in step.form.parts))
        if key not in weights:
            weight = PackedWeight(step.form, {part: parts[part] for part in step.form.parts})
            try:
                weight.check()
            except ValueError as error:
                raise Bad(f"layer {step.entry['name']!r}: {error}") from None
            weights[key] = weight
        _check_grid(step, tensors)
        found.append((weights[key], parts))
    return found


def _device(step: Step) -> torch.device:
    return step.module.codes.device if isinstance(step.module, PackedLayer) else getattr(step.module, step.tensor).device


def _check_grid(step: Step, tensors: dict[str, Tensor]) -> None:
    if "threshold" in step.parts:
        threshold, flip = (tensors[step.parts[part]] for part in ("threshold", "flip"))
        if threshold.isnan().any():
            raise Bad(f"layer {step.entry['name']!r}: threshold must not be NaN")
        if (flip > 1).any():
            raise Bad(f"layer {step.entry['name']!r}: flip must be 0 or 1; got {int(flip.max())}")
    if "step" not in step.parts:
        return
    size, zero = float(tensors[step.parts["step"]]), float(tensors[step.parts["zero_point"]])
    if not 0 < size < float("inf"):
        raise Bad(f"layer {step.entry['name']!r}: step must be positive; got {size}")
    top = 2 ** step.entry["activation_bits"] - 1
    if not (0 <= zero <= top and zero == int(zero)):
        raise Bad(f"layer {step.entry['name']!r}: zero_point must be a whole number from 0 to {top}; got {zero}")
    if zero and step.entry["method"] == "dorefa":  # no level of its weights is zero, as what fills panels up must then be
        raise Bad(f"layer {step.entry['name']!r}: zero_point must be 0 for dorefa; got {zero}")


def _apply(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], weights: list) -> None:
    for name, target in plan.plain.items():
        target.copy_(tensors[name])
    memo = {}
    for step, (weight, parts) in zip(plan.steps, weights, strict=True):
        module, entry = step.module, step.entry
        dtype = module.dtype if isinstance(module, PackedLayer) else getattr(module, step.tensor).dtype
        grid = grid_of(entry, parts)
        if step.decoded:
            become_decoded(module, step.tensor, weight, dtype, grid, memo)
        else:
            folded = (entry["batch_norm"], entry["batch_norm_bytes"]) if "batch_norm" in entry else None
            become_packed(step.entry["name"], module, weight, parts.get("bias"), dtype, entry.get("bias", True), grid, folded)
        if "stays" in entry:
            mark_staying(module, step.tensor)
    fed = {step.entry["name"]: step.entry for step in plan.steps if not step.decoded}
    for step in plan.steps:  # when all of them are packed
        if "feeds" in step.entry:
            name, other = step.entry["name"], step.entry["feeds"]
            feed(model, name, other, fed[other].get("removed", ()), plan.roots[name])
    for module in plan.folded:
        become_identity(module)
    without_fused_path(model)
    pool_without_indices(model)
    filter_stems(model)
    find_chains(model)
