// Codes of groups that have numbers of bits of their own, and the weights that they stand for (quantize/packed/stream.py). Torch-free.
#pragma once

#include <cstdint>

#include "../core/host_device.h"

namespace quantize::packed {

// group_bits: nibbles of bits - 1, the low one first.
QUANTIZE_HOST_DEVICE int bits_of_group(const uint8_t* group_bits, int64_t group) {
  return (group_bits[group / 2] >> (group % 2 * 4) & 15) + 1;
}

// The code at bit `place` of a stream of `bytes`; what lies beyond its end reads as zero.
QUANTIZE_HOST_DEVICE uint32_t stream_code(const uint8_t* codes, int64_t bytes, int64_t place, int bits) {
  const int64_t at = place / 8;
  uint32_t word = 0;
  for (int i = 0; i < 3 && at + i < bytes; ++i) word |= uint32_t(codes[at + i]) << (8 * i);  // 16 bits from the eighth of a byte on
  return word >> (place % 8) & ((1u << bits) - 1);
}

struct GroupScale {
  float low, step;
};

// scale: (low, range) of the weights that share them.
QUANTIZE_HOST_DEVICE GroupScale group_scale(const float* scale, int bits) { return {scale[0], scale[1] / float((1 << bits) - 1)}; }

// Each operation rounded.
QUANTIZE_HOST_DEVICE float group_value(GroupScale scale, uint32_t code) { return scale.low + float(int(code)) * scale.step; }

}  // namespace quantize::packed
