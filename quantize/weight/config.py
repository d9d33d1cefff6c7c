"""How a layer's weight is quantized: one frozen dataclass per method."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..checks import check_integer, check_number, is_integer, is_number

SCALES = ("least_squares", "max")
SIGN_GRADIENTS = ("clip", "polynomial")


class WeightConfig:
    """What all configurations have in common."""

    method = ""  # as files and reports name it
    codebook: str  # the ops' name of the levels (csrc/weight/codebook.h)
    scale: str
    scales = SCALES  # what `scale` may be
    activation_bits: int | None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if is_integer(value) or is_number(value):  # NumPy's numbers would not go into a file
                object.__setattr__(self, field.name, int(value) if is_integer(value) else float(value))
        self._check()

    def _check(self):
        who = type(self).__name__
        if self.activation_bits is not None:
            check_integer(who, "activation_bits", self.activation_bits, 2, 8)
        if self.scale not in self.scales:
            raise ValueError(f"{who}: scale must be one of {', '.join(map(repr, self.scales))}; got {self.scale!r}")


@dataclass(frozen=True)
class Uniform(WeightConfig):
    """Evenly spaced levels, symmetric about zero, with a scale for each output channel: ``scale * {-L, ..., L}``, L = 2^(bits-1) - 1.

    Args:
        weight_bits: 2 to 8. Stored in 2, 4 or 8 bits.
        activation_bits: 2 to 8 quantizes the layer's input too, with a learned step (LSQ, arXiv 1902.08153); None leaves it alone.
        scale: ``"least_squares"`` (the smallest squared error among several ranges), ``"max"`` (the largest weight is the last level), or
            ``"learned"``: one scale for the whole layer, trained as LSQ does (arXiv 1902.08153). It starts from the weights' mean and
            deviation (LSQ+, arXiv 2004.09576) and is a new float32 parameter (``module.parametrizations.weight[0].step``) that an
            optimizer made after prepare will train.

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
    scales = (*SCALES, "learned")

    def _check(self):
        check_integer("Uniform", "weight_bits", self.weight_bits, 2, 8)
        super()._check()

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

    def _check(self):
        check_integer("PowerOfTwo", "bits", self.bits, 2, 8)
        if not isinstance(self.plus, bool):
            raise TypeError(f"PowerOfTwo: plus must be a bool; got {self.plus!r}")
        super()._check()

    @property
    def weight_bits(self) -> int:
        """The same as `bits`."""
        return self.bits

    @property
    def codebook(self) -> str:
        """The ops' name of the levels (csrc/weight/codebook.h)."""
        return "po2plus" if self.plus else "po2"


@dataclass(frozen=True)
class Ternary(WeightConfig):
    """Ternary weight networks (arXiv 1605.04711): ``scale * {-1, 0, 1}`` with a scale for each output channel, stored in 2 bits.

    Zero are the weights up to 0.7 of the channel's mean magnitude (equation 6 of the paper), the scale is the mean magnitude of the others
    (equation 5); the gradient goes straight through to all of them.

    Args:
        activation_bits: 2 to 8 quantizes the layer's input too, with a learned step (LSQ, arXiv 1902.08153); None leaves it alone.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.8, 0.4, -0.6, 0.1]]))
        >>> quantize.prepare(layer, quantize.Ternary()).weight.detach()
        tensor([[ 0.6000,  0.6000, -0.6000,  0.0000]])
    """

    activation_bits: int | None = None

    method = codebook = "ternary"
    scale = "max"  # as the other methods call it
    weight_bits = 2


@dataclass(frozen=True)
class XNOR(WeightConfig):
    """Binary weights (XNOR-Net, arXiv 1603.05279): ``scale * {-1, 1}`` with a scale for each output channel, stored in 1 bit.

    The weights are centred over the input channels and clamped, the scale is the channel's mean magnitude; see :func:`quantize.binary`. The
    layer's input is binary, too: its sign, +1 for zero. Put a batch norm before it: BN, sign, convolution is the block of the paper. Right
    behind another binary layer, whose sums are often zero, a float sum of its scaled weights may miss zero by a rounding while a packed one
    does not: signs of such a pair differ between the prepared and the converted model.

    Args:
        activation_bits: 1, or None for binary weights alone (the paper's Binary-Weight-Networks).
        rectify: a quantile tau above 0.5 and up to 1, at which the weights are clamped in place of [-1, 1], from the layer's mean magnitude
            b as of a Laplace distribution: +-b ln(1 / (2 - 2 tau)) (ReCU, arXiv 2103.12369, which goes from 0.85 to 0.99). Its
            standardization is the centring here; the deviation that it divides by the scale would multiply back.
        sign_gradient: of the input's sign: ``"clip"``, 1 where ``|x| <= 1``, or ``"polynomial"``, ``2 - 2|x|`` there (Bi-Real Net,
            arXiv 1808.00278).
        reference_gradient: multiplies the weights' gradient by (1 - 1/C) n, with C > 1 input channels and n weights in a filter (by n where
            nothing is centred). That is no part of the paper; the well-known PyTorch code has it, and its learning rates go with it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.9, 0.1, -0.4, -0.2]]))
        >>> layer = quantize.prepare(layer, quantize.XNOR())
        >>> layer.weight.detach()
        tensor([[ 0.4000,  0.4000, -0.4000, -0.4000]])
        >>> layer(torch.tensor([[0.5, -3.0, 0.0, 2.0]])).detach()  # of the signs 1, -1, 1, 1
        tensor([[-0.8000]])
    """

    activation_bits: int | None = 1
    rectify: float | None = None
    sign_gradient: str = "clip"
    reference_gradient: bool = False

    method = codebook = "xnor"
    scale = "max"  # as the other methods call it
    weight_bits = 1

    def _check(self):
        if self.activation_bits is not None:
            check_integer("XNOR", "activation_bits", self.activation_bits, 1, 1, "1 or None")
        if self.rectify is not None:
            expected = "a number above 0.5, at most 1, or None"
            check_number("XNOR", "rectify", self.rectify, math.nextafter(0.5, 1), 1, expected)
        if self.sign_gradient not in SIGN_GRADIENTS:
            raise ValueError(f"XNOR: sign_gradient must be one of {', '.join(map(repr, SIGN_GRADIENTS))}; got {self.sign_gradient!r}")
        if not isinstance(self.reference_gradient, bool):
            raise TypeError(f"XNOR: reference_gradient must be a bool; got {self.reference_gradient!r}")


@dataclass(frozen=True)
class DoReFa(WeightConfig):
    """Weights, activations and gradients of few bits (DoReFa, arXiv 1606.06160); see :func:`quantize.dorefa_weight`.

    Activations are clipped to [0, 1] and rounded (:func:`quantize.dorefa_activation`). Gradients of the layers' outputs are rounded at
    random, without bias, to 2^gradient_bits levels between plus and minus each sample's largest (equation 12).

    Args:
        weight_bits: 1 to 8, or 16.
        activation_bits: 1 to 8, or 16; None and 32 leave the layer's input alone.
        gradient_bits: 2 to 8, or 16; 32 leaves gradients alone. In training mode only, and of layers that have an input to quantize.
        scale_adjusted: multiplies the quantized weights by what gives them back the deviation of the full-precision ones, a number for each
            layer that is folded into its scale (as scale-adjusted training, arXiv 1912.10207, does it): tanh and division by the largest
            multiply the deviation several times otherwise. Without effect on 1 bit, whose scale is the mean magnitude. On by
            default, though alone it wins nothing: at 2 bits and a learning rate held at 0.1 (benchmarks/binary_accuracy.py, three seeds)
            79.7 ± 21.6 % against 85.8 ± 10.5 % without. With :func:`quantize.reestimate_batch_norm`, which is what cures those tests,
            95.37 ± 0.45 % against 95.10 ± 0.66 %: within the noise.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Linear(8, 4)), quantize.DoReFa(2, 2, gradient_bits=6))
        >>> model[0].weight.unique().numel() <= 4
        True
    """

    weight_bits: int
    activation_bits: int | None
    gradient_bits: int = 32
    scale_adjusted: bool = True

    method = codebook = "dorefa"
    scale = "max"  # as the other methods call it

    def _check(self):
        if self.activation_bits == 32 and not isinstance(self.activation_bits, bool):
            object.__setattr__(self, "activation_bits", None)  # one spelling for what means the same
        for name, least, others, also in (
            ("weight_bits", 1, (16,), ", or 16"),
            ("activation_bits", 1, (16,), ", 16, 32 or None"),
            ("gradient_bits", 2, (16, 32), ", 16 or 32"),
        ):
            value = getattr(self, name)
            if value is None and name == "activation_bits":
                continue
            expected = f"DoReFa: {name} must be an integer from {least} to 8{also}; got {value!r}"
            if not is_integer(value):
                raise TypeError(expected)
            if not least <= value <= 8 and value not in others:
                raise ValueError(expected)
        if not isinstance(self.scale_adjusted, bool):
            raise TypeError(f"DoReFa: scale_adjusted must be a bool; got {self.scale_adjusted!r}")


@dataclass(frozen=True)
class DiffQ(WeightConfig):
    """Learned bits for each group of weights, by pseudo quantization noise (DiffQ, arXiv 2104.09987).

    In training ``w + range * n / (2^b - 1)``, with n of the deviation of a true rounding error and ``b = min_bits + (max_bits - min_bits)
    sigmoid(logit)``; in evaluation b is rounded and the weight lies on the grid of 2^b levels between the range's ends. The logits are
    parameters: train them with :func:`quantize.add_bit_parameters`, and add :func:`quantize.size_penalty` to the loss, else nothing keeps
    the bits down. Equation 4 of the paper, with two changes that `range` and `noise` undo. Checkpointing runs code again with the same
    noise, but for reentrant checkpoints inside of reentrant checkpoints: give those ``use_reentrant=False``.

    Args:
        group_size: weights in a row that share their bits, counted over the whole tensor; the last group may be short. 0: the whole tensor.
        min_bits, max_bits: 1 to 16; need not be whole.
        init_bits: where all groups start.
        range: ``"channel"``: lowest to highest weight of each output channel; ``"tensor"``: of all, as in the paper, where one outlier
            coarsens a whole layer; ``"group"``: of each group, which costs 8 bytes a group.
        noise: ``"uniform"``, of deviation 1/sqrt(12), or ``"gaussian"``, of deviation 1/2, as in the paper: 1.73 times what rounding does.
        activation_bits: 2 to 8 quantizes the layer's input too, with a learned step (LSQ, arXiv 1902.08153); ``"learned"``: with the same
            noise, learned bits from min_bits to 8 at most and a learned end (NIPQ, CVPR 2023; see
            :func:`quantize.activation_penalty`); None leaves it alone.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> model = quantize.prepare(nn.Sequential(nn.Linear(8, 4)), quantize.DiffQ(group_size=16))
        >>> quantize.weight_bits(model)
        {'0.weight': tensor([8., 8.])}
    """

    group_size: int = 8
    min_bits: float = 2
    max_bits: float = 15
    init_bits: float = 8
    range: str = "channel"
    noise: str = "uniform"
    activation_bits: int | str | None = None

    method = "diffq"
    scale = "max"  # as the other methods call it

    def _check(self):
        check_integer("DiffQ", "group_size", self.group_size, 0, 2**48, "an integer of at least 0, and at most 2^48")
        for name in ("min_bits", "max_bits", "init_bits"):
            check_number("DiffQ", name, getattr(self, name), 1, 16)
        if self.min_bits > self.max_bits:
            raise ValueError(f"DiffQ: min_bits must be at most max_bits, {self.max_bits}; got {self.min_bits}")
        if not self.min_bits <= self.init_bits <= self.max_bits:
            raise ValueError(
                f"DiffQ: init_bits must be from min_bits to max_bits, {self.min_bits} to {self.max_bits}; got {self.init_bits}"
            )
        if math.ceil(self.min_bits) > math.floor(self.max_bits):
            raise ValueError(f"DiffQ: min_bits to max_bits must hold a whole number; got {self.min_bits} to {self.max_bits}")
        for name, choices in (("range", ("channel", "tensor", "group")), ("noise", ("uniform", "gaussian"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"DiffQ: {name} must be one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}")
        if self.activation_bits != "learned":
            super()._check()
        elif not 2 <= self.min_bits <= 8:
            raise ValueError(f'DiffQ: min_bits must be from 2 to 8 with activation_bits="learned"; got {self.min_bits}')
