"""What to keep of an activation for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_integer, check_number
from ..patterns import check

BIT_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class ActivationConfig:
    """How the activations saved for backward are compressed.

    Args:
        bits: average bits per element. With ``max_bits == bits`` every element has exactly these bits (1, 2, 4 or 8); below
            ``max_bits`` any number in between, and the bits adapt per sample.
        max_bits: the most bits that a sample may get: 1, 2, 4 or 8.
        group_size: elements that share a range (two 16-bit numbers), or ``"sample"`` or ``"tensor"``.
        per_layer: move bits between layers too, to where the weight gradients' variance gains most; learned in each of the first 100
            steps and in every fourth then. Needs :class:`quantize.QModule`.
        use_gradient: weigh samples by the gradient magnitudes of their last visit. Needs ``model.set_sample_indices(indices)`` before
            each forward.
        enabled: False keeps everything in full precision.
        compress_once: where a convolution reads a batch norm's output, or that of a (leaky) ReLU behind it, keep nothing for the
            convolution: its backward makes the input of the norm's packed one and the ReLU's mask. 3 bits an element in place of 5 at
            ``bits=2``, as unbiased; the noise in the convolution's gradient is that of the norm's input, whose range is wider. Needs
            :class:`quantize.QModule`; not with QSyncBatchNorm, nor under activation checkpointing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> ActivationConfig(bits=2, max_bits=2)  # exactly two bits, as ActNN's L2
        ActivationConfig(bits=2, max_bits=2, group_size=256, per_layer=True, use_gradient=False, enabled=True, compress_once=False)

    Source: ActNN, arXiv 2104.14129, sections 3 (per-group quantization) and 4 (adaptive bits).
    """

    bits: float = 2
    max_bits: int = 8
    group_size: int | str = 256
    per_layer: bool = True
    use_gradient: bool = False
    enabled: bool = True
    compress_once: bool = False

    def __post_init__(self):
        for name in ("bits", "max_bits"):
            check_number("ActivationConfig", name, getattr(self, name))
        if self.max_bits not in BIT_WIDTHS:
            raise ValueError(f"ActivationConfig: max_bits must be 1, 2, 4 or 8; got {self.max_bits!r}")
        check_integer("ActivationConfig", "max_bits", self.max_bits)
        if not 1 <= self.bits <= self.max_bits:
            raise ValueError(f"ActivationConfig: bits must lie between 1 and max_bits ({self.max_bits}); got {self.bits!r}")
        expected = 'a positive integer below 2^63, "sample" or "tensor"'
        if not isinstance(self.group_size, str):
            check_integer("ActivationConfig", "group_size", self.group_size, 1, 2**63 - 1, expected)
        elif self.group_size not in ("sample", "tensor"):
            raise ValueError(f"ActivationConfig: group_size must be {expected}; got {self.group_size!r}")
        if not self.adaptive and self.bits not in BIT_WIDTHS:
            raise ValueError(
                f'ActivationConfig: bits must be 1, 2, 4 or 8 with group_size="tensor", which leaves nothing to adapt; got {self.bits!r}'
            )
        for name, kind in (("bits", float), ("max_bits", int), ("group_size", int)):  # not NumPy's, which torch.compile's ops refuse
            if not isinstance(value := getattr(self, name), (int, float, str)) or type(value).__module__ == "numpy":
                object.__setattr__(self, name, kind(value))
        for name in ("per_layer", "use_gradient", "enabled", "compress_once"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"ActivationConfig: {name} must be a bool; got {getattr(self, name)!r}")

    @property
    def adaptive(self) -> bool:
        """Whether samples get bits of their own. One range for the whole tensor leaves nothing to adapt."""
        return self.max_bits > self.bits and self.group_size != "tensor"


def op_group_size(group_size: int | str) -> int:
    """The ops' spelling of a group size (csrc/activation/group_layout.h)."""
    return {"sample": 0, "tensor": -1}.get(group_size, group_size)


def check_config(config, who: str):
    """`config` itself if it is an ActivationConfig, None, or a mapping from patterns to these."""
    return check(config, (ActivationConfig,), who)
