"""A weight as the tensors that are stored of it, wherever they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from . import layout, stream
from .form import Form, Rows, Stream


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The stored tensors of a weight, by the names that its form has for them."""

    form: Form
    parts: Mapping[str, Tensor]

    @classmethod
    def of_levels(cls, method: str, bits: int, levels: Tensor, scales: Tensor, transposed: bool, groups: int) -> PackedWeight:
        """From what WeightQuantizer.encode gives: levels with the channel axis first, and a scale for each of its entries."""
        if transposed:
            levels, scales = levels.movedim(0, 1), scales.repeat(groups)
        form = Rows(method, bits, tuple(levels.shape), transposed, groups)
        codes = layout.pack(layout.to_rows(levels, transposed, groups), method, bits)
        return cls(form, {"codes": codes, "scales": scales.float().contiguous()})

    @classmethod
    def of_groups(cls, config, found, shape: tuple[int, ...], transposed: bool, groups: int) -> PackedWeight:
        """From what DiffQQuantizer.encode_groups gives (codes, bits and scales) for a weight of `shape`."""
        bits = int(found.bits.max())
        form = Stream(config.method, bits, shape, transposed, groups, config.group_size, config.range)
        codes = stream.pack(found.codes, found.bits, form.size)
        parts = {"codes": codes, "group_bits": stream.pack_bits(found.bits), "scales": found.scales.float().contiguous()}
        return cls(replace(form, code_bytes=len(codes)), parts)

    @property
    def bits(self) -> int:
        """Bits of a code, at most."""
        return self.form.bits

    def scaled(self, factor: Tensor) -> PackedWeight | None:
        """As :meth:`Form.scaled`. The codes are shared."""
        found = self.form.scaled(self.parts, factor)
        return None if found is None else PackedWeight(*found)

    def decode(self) -> Tensor:
        """The float32 weight, contiguous."""
        return self.form.decode(self.parts, self.form.table(self.parts)).contiguous()

    def check(self) -> None:
        """As :meth:`Form.check`."""
        self.form.check(self.parts)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight's dimension 1 holds the output channels."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd) or getattr(module, "transposed", False) is True


def conv_groups(module: nn.Module) -> int:
    """Groups that matter to the order of the weight's channels: a transposed convolution's."""
    return module.groups if is_transposed(module) else 1
