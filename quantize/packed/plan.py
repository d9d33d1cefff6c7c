"""Does a file fit a model? Every layer and tensor is compared before anything is read or changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .contents import attributes, identity, input_grid, join, own_tensors
from .fold import BATCH_NORMS
from .form import Form, form_of
from .header import Bad, Header, Stored, short
from .modules import ATTRIBUTES, TENSORS, PackedLayer
from .plain import kind_of, shell, without_compression
from .replace import packed_class, taken_name
from .trace import Calls, collected
from .weight import conv_groups, is_transposed


class Step(NamedTuple):
    """One packed weight to be put in. `parts`: the file's tensor of each part."""

    entry: dict
    module: nn.Module
    tensor: str  # the parameter's name
    form: Form
    parts: dict[str, str]

    @property
    def decoded(self) -> bool:
        return "decoded" in self.entry


class Plan(NamedTuple):
    """What load() will do: the packed weights, the plain tensors to copy into, and the batch norms that go. `roots`: the modules whose
    traces show that layers feed others, by the layers' names."""

    steps: list[Step]
    plain: dict[str, Tensor]
    folded: list[nn.Module]
    roots: dict[str, str]


def make_plan(model: nn.Module, header: Header) -> Plan:
    """Raises Bad at the first difference, in the model's order."""
    entries: dict[str, list[dict]] = {}
    for entry in header.layers:
        entries.setdefault(entry["name"], []).append(entry)
    folds = {entry["batch_norm"]: entry for entry in header.layers if "batch_norm" in entry}
    if len(folds) < sum("batch_norm" in entry for entry in header.layers):
        raise Bad("layers: a batch_norm must be folded into one layer only")
    removed = _removed(header.layers)
    plan, seen, used = Plan([], {}, [], {}), set(), set()
    grids = {grid for m in model.modules() if (grid := input_grid(m)) is not None}  # of a model that was converted before
    for name, module in model.named_modules():
        if module in grids:
            continue
        if name in folds and name not in entries:
            _check_norm(name, module, folds.pop(name))
            plan.folded.append(module)
            continue
        if name in removed and name not in entries:
            _check_removed(name, module, removed.pop(name))
            plan.folded.append(module)
            continue
        without = set()
        for entry in entries.pop(name, []):
            step = _step(entry, module, header.tensors)
            plan.steps.append(step)
            used.update(step.parts.values())
            without |= {step.tensor} if step.decoded else {"weight", *TENSORS}
        if not without and isinstance(module, PackedLayer):
            raise Bad(f"layer {name!r}: expected {kind_of(module)}, packed, as the model has it; found no layer of that name")
        for part, tensor in own_tensors(module, without):
            _in_memory(name, part, tensor)
            if identity(tensor) not in seen:
                seen.add(identity(tensor))
                full = join(name, part)
                _check_tensor(full, name, tensor.dtype, tuple(tensor.shape), header.tensors)
                plan.plain[full] = tensor
    if entries:
        name, found = next(iter(entries.items()))
        raise Bad(f"layer {short(name)}: expected no such layer, as in the model; found {found[0]['kind']} {found[0]['shape']}")
    if folds:
        raise Bad(f"layer {short(next(iter(folds)))}: expected a batch norm of the model; the model has no such module")
    if removed:
        raise Bad(f"layer {short(next(iter(removed)))}: expected what stands before a sign in the model; the model has no such module")
    plan.roots.update(_check_feeds(model, plan.steps))
    extra = sorted(set(header.tensors) - set(plan.plain) - used)
    if extra:
        raise Bad(f"tensor {short(extra[0])}: expected no such tensor, as in the model; found {_words(header.tensors[extra[0]])}")
    return plan


def _words(stored: Stored) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"


def _check_tensor(full: str, layer: str, dtype: torch.dtype, shape: tuple[int, ...], tensors: dict[str, Stored]) -> None:
    stored, expected = tensors.get(full), f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    if stored is None:
        raise Bad(f"layer {layer!r}: expected tensor {full!r}, {expected}; found none")
    if (stored.dtype, stored.shape) != (dtype, shape):
        raise Bad(f"layer {layer!r}: expected tensor {full!r}, {expected}; found {_words(stored)}")


def _check_norm(name: str, module: nn.Module, entry: dict) -> None:
    channels = entry["shape"][1] * entry.get("groups", 1) if entry["kind"].startswith("ConvTranspose") else entry["shape"][0]
    if type(module) is nn.Identity:
        return
    if not issubclass(type(module), BATCH_NORMS) or module.num_features != channels:
        what = f"{kind_of(module)}({getattr(module, 'num_features', '')})"
        raise Bad(
            f"layer {name!r}: expected {what}, as in the model; found a batch norm of {channels} channels, folded into {entry['name']!r}"
        )


def _removed(layers: list[dict]) -> dict[str, dict]:
    """The layer that each module went into, by the module's name; several may share one."""
    found: dict[str, dict] = {}
    for entry in layers:
        for name in entry.get("removed", ()):
            first = found.setdefault(name, entry)
            if first["removed"] != entry["removed"]:
                raise Bad(f"layers: {short(name)} must be removed with the same modules everywhere; got {short(entry['removed'])}")
    return found


def _check_removed(name: str, module: nn.Module, entry: dict) -> None:
    if type(module) is nn.Identity or isinstance(module, (nn.Hardtanh, nn.ReLU)):
        return
    channels = entry["shape"][1] * entry.get("groups", 1) if len(entry["shape"]) > 1 else 0
    if not issubclass(type(module), BATCH_NORMS) or module.num_features != channels:
        what = f"{kind_of(module)}({getattr(module, 'num_features', '')})"
        found = f"what stands before the sign of {channels} channels of {entry['name']!r}"
        raise Bad(f"layer {name!r}: expected {what}, as in the model; found {found}")


def _check_feeds(model: nn.Module, steps: list[Step]) -> dict[str, str]:
    """Layers that hand bits on must hand them to one that takes them, and nothing else may see them: Plan.roots."""
    by_name = {step.entry["name"]: step for step in steps if not step.decoded}
    for step in steps:
        if "feeds" not in step.entry:
            continue
        other = by_name.get(step.entry["feeds"])
        fits = not step.decoded and other is not None and "input" in other.entry and other.entry["kind"] == step.entry["kind"]
        if not fits or other is step or other.entry["shape"][1] * other.entry.get("groups", 1) != step.form.channels:
            raise Bad(
                f"layer {step.entry['name']!r}: feeds must be a {step.entry['kind']} with an input of {step.form.channels} signs; "
                f"got {short(step.entry['feeds'])}"
            )
    feeding = [step.entry for step in steps if "feeds" in step.entry]
    links = {(name, other): root for name, other, root in (_links(model, by_name) if feeding else ())}
    for entry in feeding:
        if (entry["name"], entry["feeds"]) not in links:
            raise Bad(
                f"layer {entry['name']!r}: feeds must be the layer that alone takes its output in the model's forward; "
                f"got {short(entry['feeds'])}"
            )
    return {entry["name"]: links[entry["name"], entry["feeds"]] for entry in feeding}


def _links(model: nn.Module, steps: dict[str, Step]) -> list[tuple[str, str, str]]:
    """Names of layers, the second of which alone sees the first one's output, with nothing between them but what it stands for, and of the
    module whose trace says so."""
    copied = shell(model, "load").eval()
    without_compression(copied)
    names = {m: name for name, m in copied.named_modules()}
    removed = {copied.get_submodule(name) for step in steps.values() for name in step.entry.get("removed", ())}

    def collect(root: nn.Module, graph: fx.Graph) -> list[tuple[str, str, str]]:
        calls, found = Calls(root, graph), []
        for node in calls.nodes:
            layer = calls.link(node)
            if layer is None or names[layer] not in steps:
                continue
            between = {copied.get_submodule(name) for name in steps[names[layer]].entry.get("removed", ())}
            above = node.args[0]
            while len(above.users) == 1 and ((passed := calls.link(above)) in between or type(passed) is nn.Identity):
                above = above.args[0]
            source = calls.alone(above)
            if source is not None and len(above.users) == 1:
                found.append((names[source], names[layer], names[root]))
        return found

    return collected(copied, {*map(copied.get_submodule, steps), *removed}, collect)


def _step(entry: dict, module: nn.Module, tensors: dict[str, Stored]) -> Step:
    name, tensor = entry["name"], entry.get("decoded", "weight")

    def differ(what: str, expected, found) -> None:
        if expected != found:
            raise Bad(f"layer {name!r}: expected {what} {expected}, as in the model; found {short(found)}")

    differ("kind", kind_of(module), entry["kind"])
    packable = packed_class(module) is not None and tensor == "weight"
    differ("a weight that is", "packed" if packable else "decoded", "decoded" if "decoded" in entry else "packed")
    shape, has_bias = _shape(name, module, tensor), False
    differ(f"{tensor} of shape", shape, entry["shape"])
    if packable and (taken := taken_name(module)) is not None:
        raise Bad(f"layer {name!r}: expected no attribute {taken!r} of its own, which packed layers have; rename it")
    mine = attributes(module)
    for attribute, default in ATTRIBUTES.items():
        differ(attribute, mine.get(attribute, default), entry.get(attribute, default))
    if packable:
        has_bias = module.plain_bias if isinstance(module, PackedLayer) else module.bias is not None
        differ("bias", has_bias, entry.get("bias", True))
    prefix = "" if packable else f"{tensor}."
    form = form_of(entry, is_transposed(module), conv_groups(module))
    parts = form.shapes()
    if packable and (has_bias or "batch_norm" in entry):
        parts["bias"] = (torch.float32, (form.channels,))
    if "removed" in entry:
        channels = shape[1] * entry.get("groups", 1)
        parts |= {"threshold": (torch.float32, (channels,)), "flip": (torch.uint8, (channels,))}
    elif "activation_bits" in entry and "input" not in entry:
        parts |= {"step": (torch.float32, ()), "zero_point": (torch.float32, ())}
    tied, places = entry.get("tied", {}), {}
    for part, (dtype, part_shape) in parts.items():
        places[part] = tied.get(prefix + part, join(name, prefix + part))
        _check_tensor(places[part], name, dtype, part_shape, tensors)
    if set(tied) - {prefix + part for part in parts}:
        raise Bad(f"layer {name!r}: tied must name tensors of the layer; got {short(sorted(tied))}")
    return Step(entry, module, tensor, form, places)


def _shape(name: str, module: nn.Module, tensor: str) -> list[int]:
    """Of the float weight."""
    if isinstance(module, PackedLayer) and tensor == "weight":
        return list(module.shape)
    weight = module._parameters.get(tensor)
    if weight is None and is_parametrized(module, tensor):
        own = type(module.parametrizations[tensor][0]).__name__
        raise Bad(
            f"layer {name!r}: expected a plain parameter {tensor!r}, which the file stands for; the model has {own} before it; "
            f"call torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r}) first"
        )
    if weight is None:
        raise Bad(f"layer {name!r}: expected a parameter {short(tensor)} in the model; {kind_of(module)} has none")
    _in_memory(name, tensor, weight)
    return list(weight.shape)


def _in_memory(layer: str, part: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.device.type == "meta":
        raise Bad(f"layer {layer!r}: expected a model with its tensors in memory; {part} has no values yet")
