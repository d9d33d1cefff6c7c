"""What each layer costs at each choice of bits: bytes in the file, bit operations in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..copies import copy_of
from ..packed.plain import without_compression
from ..packed.size_report import dtype_bits, report_of
from ..packed.summary import count_macs
from ..patterns import exactly
from ..weight.config import WeightConfig
from ..weight.prepare import prepare, quantizes_input, tensor_names
from .choices import weight_bits_of
from .replay import positional, samples_in

WHO = "measure_sensitivity"
FLOAT_BITS = 32


def stored_bytes(model: nn.Module, groups: Sequence[Sequence[str]], configs: Sequence[WeightConfig | None]) -> tuple[Tensor, int]:
    """Bytes of each group at each config, int64 [L, K], in the file of the converted model, and all others'.

    Biases, scales and folded batch norms count with their layers. Where the layer stays in full precision, its batch norm stays too.
    The sum over layers is the file's size for every assignment, but for a few bytes a channel where inputs are signs (one activation bit):
    there a batch norm becomes thresholds, which depends on two layers.
    """
    plain = copy_of(model, WHO).eval()
    without_compression(plain)
    every = [name for names in groups for name in names]
    table, others = torch.zeros(len(groups), len(configs), dtype=torch.long), 0
    together = [k for k, config in enumerate(configs) if config is not None] or list(range(len(configs)))
    for k in together:
        report = report_of(plain if configs[k] is None else prepared_at(plain, dict.fromkeys(every, configs[k])), WHO)
        rows = _by_layer(report)
        table[:, k] = torch.tensor([sum(rows.get(name, 0) for name in names) for names in groups])
        others = max(others, report.bytes - int(table[:, k].sum()))
        if configs[k] is not None and (k == together[0] or configs[k].activation_bits != 1):
            reference, floats = k, _by_layer(report, "float_bytes")
    for k in set(range(len(configs))) - set(together):  # one layer in full precision among quantized ones
        for number, names in enumerate(groups):
            if configs[reference].activation_bits != 1 and not _tied_outside(plain, names):
                table[number, k] = sum(floats.get(name, 0) for name in names)
                continue
            with_all = others + int(table[:, reference].sum())
            some = dict.fromkeys((name for name in every if name not in names), configs[reference])
            without = report_of(prepared_at(plain, some) if some else plain, WHO).bytes
            table[number, k] = without - with_all + table[number, reference]
    return table, others


def _tied_outside(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether modules beside those named have parameters of theirs."""
    own = {id(p) for name in names for p in model.get_submodule(name)._parameters.values() if p is not None}
    inside = {model.get_submodule(name) for name in names}
    return any(id(p) in own for module in model.modules() if module not in inside for p in module._parameters.values())


def prepared_at(model: nn.Module, config: Mapping[str, WeightConfig | None]) -> nn.Module:
    """A copy with each of the modules named prepared as `config` has it, and no others."""
    return prepare(copy_of(model, WHO), {"*": None, **{exactly(name): own for name, own in config.items()}})


def _by_layer(report, what: str = "bytes") -> dict[str, int]:
    rows: dict[str, int] = {}
    for row in report.layers:
        rows[row.name] = rows.get(row.name, 0) + getattr(row, what)
    return rows


def bit_operations(model: nn.Module, inputs, groups: Sequence[Sequence[str]], configs: Sequence[WeightConfig | None]) -> Tensor:
    """Bit operations of a sample in each group at each config, int64 [L, K]: multiply-accumulates times weight bits times input bits.

    As :func:`quantize.summary` counts them: floats with their own bits, and no input bits for modules whose input is not quantized.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (positional(inputs), {})
    samples = samples_in(inputs)
    macs, _, seen = count_macs(model, args, kwargs)

    def cost(name: str, config: WeightConfig | None) -> float:
        module = model.get_submodule(name)
        weight = dtype_bits(getattr(module, tensor_names(module)[0])) if config is None else weight_bits_of(config)
        activation = config.activation_bits if config is not None and quantizes_input(module) else None
        return macs[name] * weight * (activation or seen.get(name, FLOAT_BITS)) / samples

    table = [[sum(cost(name, config) for name in names) for config in configs] for names in groups]
    return torch.tensor(table, dtype=torch.float64).round().long()
