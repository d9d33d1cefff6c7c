"""A tensor packed in groups, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..checks import check_integer
from ..dtypes import FLOATS
from .config import BIT_WIDTHS, ActivationConfig, op_group_size


class PackedActivations:
    """What :func:`pack_activations` returns, which makes it: the bytes, and how to get the tensor back.

    Args:
        codes, ranges, bits, group_size: see the attributes.
        like: the tensor that was packed, of which shape, strides, dtype and device are kept.
        seed: int64 [2] on the CPU, seed and offset of the noise.

    Attributes:
        codes: uint8 [bytes], the codes; or, where codes and ranges would take no less, a copy of the tensor itself.
        ranges: int16 [groups, 2], the groups' ranges (csrc/activation/group_format.h), [0, 2] with a copy.
        bits, group_size: as asked for.
        shape, dtype, device: of the tensor.
        nbytes: bytes of codes and ranges.
    """

    def __init__(self, codes: Tensor, ranges: Tensor, bits: int, group_size: int | str, like: Tensor, seed: Tensor):
        self.codes, self.ranges, self.bits, self.group_size = codes, ranges, bits, group_size
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._strides = _C.packed_strides(list(like.shape), list(like.stride()))
        self._seed = seed

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ranges."""
        return self.codes.nbytes + self.ranges.nbytes

    def unpack(self) -> Tensor:
        """The tensor again: same shape, dtype, device and memory format; its mean over seeds is the tensor that was packed."""
        if self.codes.dtype != torch.uint8:
            return self.codes.clone()
        group = op_group_size(self.group_size)
        return torch.ops.quantize.group_dequantize(
            self.codes, self.ranges, None, self.bits, group, self.shape, self._strides, self.dtype, self._seed
        )

    def __repr__(self):
        return (
            f"PackedActivations({tuple(self.shape)}, {self.dtype}, bits={self.bits}, group_size={self.group_size!r}, nbytes={self.nbytes})"
        )


def pack_activations(x: Tensor, bits: int, group_size: int | str = 256, seed: int = 0, offset: int = 0) -> PackedActivations:
    """Quantizes `x` to `bits` bits an element, unbiased, and packs the bits.

    Args:
        x: float32, float16 or bfloat16 Tensor[N, ...]; dimension 0 is the sample axis, and groups never cross a sample.
        bits: 1, 2, 4 or 8.
        group_size: elements that share a range, or ``"sample"`` or ``"tensor"``.
        seed, offset: of the noise; the same pair gives the same bits on every device.

    Returns:
        PackedActivations: ``bits/8`` bytes an element and 4 a group. What would need more than the tensor itself is kept as it is.

    Raises:
        TypeError: `x` is not a floating-point tensor of these types, or a number is of another type.
        ValueError: `bits` or `group_size` out of range.

    Example:
        >>> x = torch.randn(4, 64, 8, 8)
        >>> packed = pack_activations(x, bits=2)
        >>> packed.nbytes / x.nbytes  # 2 bits of 32, and 32 bits for each 256 elements
        0.06640625
        >>> packed.unpack().shape
        torch.Size([4, 64, 8, 8])

    Source: ActNN, arXiv 2104.14129, section 3; the ranges are rounded before the codes are drawn, so that the mean is exact.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"pack_activations: x must be a Tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"pack_activations: x must be float32, float16 or bfloat16; got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"pack_activations: x must be a dense Tensor; got {'a nested one' if x.is_nested else x.layout}")
    check_integer("pack_activations", "bits", bits, expected="1, 2, 4 or 8")
    if bits not in BIT_WIDTHS:
        raise ValueError(f"pack_activations: bits must be 1, 2, 4 or 8; got {bits!r}")
    ActivationConfig(bits=bits, max_bits=bits, group_size=group_size)  # checks group_size
    for name, value in (("seed", seed), ("offset", offset)):
        check_integer("pack_activations", name, value)
    x = x.detach()
    state = torch.tensor([_wrap(seed), _wrap(offset)], dtype=torch.int64, device="cpu")
    codes, ranges = torch.ops.quantize.group_quantize(x, bits, op_group_size(group_size), state)
    if codes.nbytes + ranges.nbytes >= x.nbytes and x.numel():
        codes, ranges = x.clone(), ranges.new_empty(0, 2)
    return PackedActivations(codes, ranges, bits, group_size, x, state)


def _wrap(value: int) -> int:
    """A Python integer modulo 2^64, as int64 holds it."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
