"""How a layer's weight is quantized: one frozen dataclass per method."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

SCALES = ("least_squares", "max")


def _check_bits(who: str, name: str, value, least: int = 2) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{who}: {name} must be an integer from {least} to 8; got {value!r}")
    if not least <= value <= 8:
        raise ValueError(f"{who}: {name} must be an integer from {least} to 8; got {value!r}")


class WeightConfig:
    """What all configurations have in common."""

    method = ""  # as files and reports name it
    codebook: str  # the ops' name of the levels (csrc/weight/codebook.h)
    scale: str
    activation_bits: int | None

    def __post_init__(self):
        who = type(self).__name__
        if self.activation_bits is not None:
            _check_bits(who, "activation_bits", self.activation_bits)
        if self.scale not in SCALES:
            raise ValueError(f"{who}: scale must be one of {', '.join(map(repr, SCALES))}; got {self.scale!r}")


@dataclass(frozen=True)
class Uniform(WeightConfig):
    """Evenly spaced levels, symmetric about zero, with a scale for each output channel: ``scale * {-L, ..., L}``, L = 2^(bits-1) - 1.

    Args:
        weight_bits: 2 to 8. Stored in 2, 4 or 8 bits.
        activation_bits: 2 to 8 quantizes the layer's input too, with a learned step (LSQ, arXiv 1902.08153); None leaves it alone.
        scale: ``"least_squares"`` (the smallest squared error among several ranges) or ``"max"`` (the largest weight is the last level).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Linear(8, 4)), quantize.Uniform(4))
        >>> model[0].weight[0].unique().numel() <= 15
        True
    """

    weight_bits: int = 8
    activation_bits: int | None = None
    scale: str = "least_squares"

    method = "uniform"

    def __post_init__(self):
        _check_bits("Uniform", "weight_bits", self.weight_bits)
        super().__post_init__()

    @property
    def codebook(self) -> str:
        """The ops' name of the levels (csrc/weight/codebook.h)."""
        return "uniform"


@dataclass(frozen=True)
class PowerOfTwo(WeightConfig):
    """Powers of two and zero, with a scale for each output channel: ``scale * {0, +-2^e}``, e = 0 .. 2^(bits-1) - 2.

    Args:
        bits: 2 to 8: a sign and an exponent code, of which 0 is zero. Four bits give 0, 1, 2, ..., 64.
        plus: PO2+, the nearest power of two; else PO2, which rounds the logarithm.
        activation_bits: 2 to 8 quantizes the layer's input too, with a learned step (LSQ, arXiv 1902.08153); None leaves it alone.
        scale: ``"least_squares"`` (the smallest squared error among several ranges) or ``"max"`` (the largest weight is the last level).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.8, 0.45, -0.1, 0.001]]))
        >>> weight = quantize.prepare(layer, quantize.PowerOfTwo(bits=4)).weight.detach()
        >>> weight / weight.max()
        tensor([[ 1.0000,  0.5000, -0.1250,  0.0000]])
    """

    bits: int = 4
    plus: bool = True
    activation_bits: int | None = None
    scale: str = "least_squares"

    method = "power_of_two"

    def __post_init__(self):
        _check_bits("PowerOfTwo", "bits", self.bits)
        if not isinstance(self.plus, bool):
            raise TypeError(f"PowerOfTwo: plus must be a bool; got {self.plus!r}")
        super().__post_init__()

    @property
    def weight_bits(self) -> int:
        """The same as `bits`."""
        return self.bits

    @property
    def codebook(self) -> str:
        """The ops' name of the levels (csrc/weight/codebook.h)."""
        return "po2plus" if self.plus else "po2"
