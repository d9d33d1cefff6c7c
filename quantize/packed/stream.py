"""Codes whose number of bits changes from group to group: how they lie in bytes.

The codes of a weight are one stream of bits without gaps: output channels first and otherwise in the weight's own order, each code's lowest
bit first, in bytes whose first bit is the lowest; zero bits fill the last byte. A group is `size` codes that follow one another, across
channels too; the last may be short. The bits of the groups, 1 to 16, are nibbles of bits - 1, two a byte, the low one first. The same in
memory and in files.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BITS = 16


def group_count(numel: int, size: int) -> int:
    """Groups of `size` codes among `numel`."""
    return -(-numel // size)


def pack_bits(bits: Tensor) -> Tensor:
    """Bits uint8[groups] to nibbles uint8[ceil(groups / 2)]."""
    nibbles = bits.new_zeros(len(bits) + len(bits) % 2)
    nibbles[: len(bits)] = bits - 1
    return nibbles[::2] | nibbles[1::2] << 4


def unpack_bits(nibbles: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`pack_bits`. ValueError where the last nibble has no group and is not zero."""
    bits = torch.stack([nibbles & 15, nibbles >> 4], 1).flatten()
    if len(bits) > groups and bits[groups]:
        raise ValueError(f"group_bits: the nibble after those of {groups} groups must be zero; got {int(bits[groups])}")
    return bits[:groups] + 1


def stream_bits(bits: Tensor, numel: int, size: int) -> int:
    """The length of the stream of `numel` codes whose groups have `bits`."""
    short = size * len(bits) - numel
    return size * int(bits.sum(dtype=torch.int64)) - (short * int(bits[-1]) if short else 0)


def pack(codes: Tensor, bits: Tensor, size: int) -> Tensor:
    """Codes int32[numel] of groups with `bits`, uint8[groups], to the stream, uint8[bytes].

    Raises:
        ValueError: bits that are not 1 to 16, or a code that is not 0 to 2^bits - 1.
    """
    if not bool(((bits >= 1) & (bits <= MOST_BITS)).all()):
        raise ValueError(f"pack: bits of groups must be 1 to {MOST_BITS}; got {int(bits.min())} to {int(bits.max())}")
    each = bits.long().repeat_interleave(min(size, len(codes)))[: len(codes)]
    wrong = ((codes < 0) | (codes >> each != 0)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"pack: codes of {int(each[at])} bits must be 0 to {2 ** int(each[at]) - 1}; got {int(codes[at])} at [{at}]")
    ends = each.cumsum(0)
    nbytes = -(-int(ends[-1]) // 8)
    place = ends - each
    shifted = codes << (place % 8)  # over three bytes at most; no two codes share a bit, so that sums join them
    stream = torch.zeros(nbytes + 2, dtype=torch.uint8, device=codes.device)
    for byte in range(3):
        stream.scatter_add_(0, place // 8 + byte, (shifted >> 8 * byte & 255).to(torch.uint8))
    return stream[:nbytes]


def unpack(stream: Tensor, group_bits: Tensor, numel: int, size: int, most: int) -> Tensor:
    """The codes: uint8[numel], or where the largest group has more than eight bits (`most`) uint16 patterns in int16[numel]."""
    return torch.ops.quantize.unpack_groups(stream, group_bits, size, numel, 8 if most <= 8 else 16)


def check(stream: Tensor, group_bits: Tensor, numel: int, size: int, most: int) -> None:
    """ValueError for bits that do not fit the stream or whose largest is not `most`, and for padding that is not zero."""
    bits = unpack_bits(group_bits, group_count(numel, size))
    if int(bits.max()) != most:
        raise ValueError(f"bits must be the largest group's, {int(bits.max())}; got {most}")
    length = stream_bits(bits, numel, size)
    if -(-length // 8) != len(stream):
        raise ValueError(f"group_bits must add up to the {len(stream)} bytes of codes; they take {length} bits")
    if length % 8 and int(stream[-1]) >> length % 8:
        raise ValueError(f"codes: the padding after the last of {length} bits must be zero bits")
