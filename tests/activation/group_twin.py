"""The packed format that csrc/activation/group_format.h documents, in plain PyTorch: a group a row, an element a column, no speed.

Integers are int64 tensors; products wrap modulo 2^64, and a mask keeps what the format means.
"""

import torch
from philox_twin import WORD, philox4x32

FLT_MAX = torch.finfo(torch.float32).max


# ---------------------------------------------------------------------------------------------------------------- noise


def noise(groups, n, seed, offset):
    """16 random bits for each of the n elements of each group (by number): [groups, n]."""
    e = torch.arange(n)
    words = philox4x32(((e // 128 * 8 + e % 8)[None], groups[:, None], offset & WORD, offset >> 32), (seed & WORD, seed >> 32))
    j, half = e % 128 // 16, e % 16 // 8
    words = torch.stack(torch.broadcast_tensors(*words), -1).expand(groups.numel(), n, 4)
    u = words.gather(2, (j % 4).expand(groups.numel(), n)[..., None])[..., 0] >> (16 * half) & 0xFFFF
    return torch.where(j < 4, u, (u << 8 | u >> 8) & 0xFFFF)


def hash32(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & WORD
    return x ^ (x >> 16)


def dither(groups, n, seed, offset):
    """16 bits for each element, for rounding what was decoded to a 16-bit type."""
    key = hash32(groups ^ (seed & WORD) ^ int(hash32(torch.tensor((seed >> 32) ^ (offset & WORD)))))
    return ((key[:, None] >> 16) + torch.arange(n) * 0x9E37) & 0xFFFF


# ---------------------------------------------------------------------------------------------------------------- range


def words_of(x):
    """The 32 bits of float32 values."""
    return x.view(torch.int32).long() & WORD


def floats_of(words):
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(torch.float32)


def ranges_of(rows, bits):
    """(stored [groups, 2] as unsigned 16-bit numbers, min, scale as used) of rows of a group each."""
    levels, dtype = float(2**bits - 1), rows.dtype
    x = rows.float()
    low, high = x.amin(1) + 0.0, x.amax(1) + 0.0  # + 0.0: one zero, not two
    poisoned = ~x.isfinite().all(1)
    low, high = low.masked_fill(poisoned, 0), high.masked_fill(poisoned, 0)
    if dtype == torch.float32:
        low_words = words_of(low)
        first = (low_words >> 16) + ((low_words & 0xFFFF != 0) & (low_words >= 2**31))  # towards minus infinity
        first = torch.where(first == 0xFF80, 0xFF7F, first)
        low = floats_of(first << 16)
        second = words_of(spread(low, high, levels)) >> 16
        missed = ~(low + levels * floats_of(second << 16) >= high) & (levels * floats_of((second + 1) << 16) <= FLT_MAX)
        second = second + missed
        scale = floats_of(second << 16)
        nan = 0x7FC0
    else:
        first, second = (t.to(dtype).view(torch.int16).long() & 0xFFFF for t in (low, high))
        scale = spread(low, high, levels)
        nan = 0x7E00 if dtype == torch.float16 else 0x7FC0
    stored = torch.stack([first, second], 1).masked_fill(poisoned[:, None], nan)
    return stored, low.masked_fill(poisoned, torch.nan), scale.masked_fill(poisoned, torch.nan)


def spread(low, high, levels):
    difference = high - low
    return torch.where(difference <= FLT_MAX, difference, FLT_MAX) / levels


# ---------------------------------------------------------------------------------------------------------------- codes


def codes_of(rows, low, scale, u, bits):
    """floor((x - low)/scale + u), in the format's fixed point; in double where fp32 would leave its normal numbers."""
    x, top = rows.float(), 2**bits - 1
    low, scale = low[:, None], scale[:, None]
    fraction = 16 if bits == 8 else 16 - bits
    t = torch.where(scale == 0, 0, (x - low) * (2**fraction / scale))
    t = t.nan_to_num(0, 0, 0)
    if bits == 8:
        code = ((t + 0.5).long() + u) >> 16
    else:
        code = (t.round().long() + (u >> bits)).clamp(max=0xFFFF) >> (16 - bits)
    extreme = (scale != 0) & ~((scale >= 2.0**-96) & (scale <= 2.0**112) & (low > -(2.0**127)))
    in_double = (x.double() - low.double()) / scale.double() + u.double() * 2.0**-16
    code = torch.where(extreme, in_double.nan_to_num(0).clamp(0, top).long(), code)
    return code.clamp(max=top).masked_fill(low.isnan(), 0)


def bit_places(n, bits):
    """Where each element's code starts, in bits from the start of its group's."""
    e = torch.arange(n)
    block = 256 // bits
    i = e % block
    interleaved = e // block * 256 + (2 * (i % 8) + i % 16 // 8) * 16 + i // 16 * bits
    return torch.where(e < n // block * block, interleaved, e * bits)


def to_bytes(codes, bits):
    """[groups, n] codes to [groups, bytes]."""
    groups, n = codes.shape
    size = (n * bits + 7) // 8
    spots = torch.zeros(groups, 8 * size, dtype=torch.int64)
    for b in range(bits):
        spots[:, bit_places(n, bits) + b] = codes >> b & 1
    return (spots.view(groups, size, 8) << torch.arange(8)).sum(2).to(torch.uint8)


def from_bytes(data, n, bits):
    spots = (data.long()[..., None] >> torch.arange(8) & 1).flatten(1)
    return sum(spots[:, bit_places(n, bits) + b] << b for b in range(bits))


def rounded(value, u, dtype):
    """Decoded fp32 values in the tensor's type: a neighbour with the probability that keeps the mean."""
    if dtype == torch.float32:
        return value
    if dtype == torch.bfloat16:
        words = (words_of(value) + u) >> 16 & 0xFFFF
    else:
        value = value.clamp(max=65504.0)
        magnitude, sign = words_of(value.abs()), words_of(value) >> 16 & 0x8000
        normal = (magnitude + (u >> 3) - 0x38000000) >> 13
        small = ((value.abs() * 2.0**40).nan_to_num(0).clamp(max=2.0**40).long() + u) >> 16
        words = sign | torch.where(magnitude < 0x38800000, small, normal)
    result = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16).view(dtype)
    return result.masked_fill(value.isnan(), torch.nan)


# ---------------------------------------------------------------------------------------------------------------- whole tensors


def memory_order(x):
    """[samples, elements] in memory order: as it lies where memory is dense and the samples outermost, else as if contiguous."""
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), d))
    y = x.permute(order)
    outermost = x.dim() < 2 or x.shape[0] == 1 or next(d for d in order if x.shape[d] > 1) == 0
    dense = y.is_contiguous() and outermost
    return (y if dense else x).reshape(x.shape[0] if x.dim() else 1, -1)


def pack(x, bits, group_size, seed=0, offset=0):
    """What group_quantize makes of [samples, elements] and what comes back: (codes, ranges, decoded). group_size in elements;
    bits: a number, or one for each sample."""
    samples, elements = x.shape
    per_sample = list(bits) if not isinstance(bits, int) else [bits] * samples
    groups_each = -(-elements // group_size)
    decoded = torch.empty_like(x)
    ranges = torch.empty(samples, groups_each, 2, dtype=torch.int64)
    data = [[torch.empty(0, dtype=torch.uint8)] * 2 for _ in range(samples)]
    whole = elements // group_size * group_size
    for b in sorted(set(per_sample)):
        rows_of = torch.tensor([n for n in range(samples) if per_sample[n] == b])
        for part, (begin, end) in enumerate(((0, whole), (whole, elements))):
            if begin == end:
                continue
            width = group_size if part == 0 else end - begin
            rows = x[rows_of, begin:end].reshape(-1, width)
            numbers = torch.arange(begin // group_size, -(-end // group_size))
            groups = (rows_of[:, None] * groups_each + numbers).flatten()
            stored, low, scale = ranges_of(rows, b)
            packed = to_bytes(codes_of(rows, low, scale, noise(groups, width, seed, offset), b), b)
            value = low[:, None] + from_bytes(packed, width, b).float() * scale[:, None]
            back = rounded(value, dither(groups, width, seed, offset), x.dtype)
            decoded[rows_of, begin:end] = back.view(rows_of.numel(), -1)
            ranges[rows_of[:, None], numbers] = stored.view(rows_of.numel(), -1, 2)
            for i, n in enumerate(rows_of.tolist()):
                data[n][part] = packed.view(rows_of.numel(), -1)[i]
    codes = torch.cat([piece for both in data for piece in both])
    return codes, torch.where(ranges >= 2**15, ranges - 2**16, ranges).to(torch.int16).view(-1, 2), decoded
