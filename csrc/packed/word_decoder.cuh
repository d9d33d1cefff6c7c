// Codes of 2, 4 and 8 bits to their levels in bytes, a word at a time, in registers.
#pragma once

#include "../core/warp.cuh"

namespace quantize::packed {

QUANTIZE_DEVICE uint32_t level_byte(const float* levels, int bits, int code) {
  if (bits == 8) return uint32_t(code);
  const float level = levels[code];
  return level == level ? uint32_t(int(level)) & 255 : 0;  // NaN: a code that does not occur
}

// Bytes 0 to 3 of a and 4 to 7 of b, chosen by the four low nibbles of `places`, at most 7 each.
QUANTIZE_DEVICE uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t places) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, places);
#else
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (8 * (places >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
#endif
}

// A word of codes to its levels in bytes.
template <int bits>
struct WordDecoder {
  static constexpr int words = 8 / bits;
  uint32_t table[4] = {};  // of 2 and 4 bits

  QUANTIZE_DEVICE explicit WordDecoder(const float* levels) {
    if constexpr (bits < 8) static_for<(1 << bits)>([&]<int i>() { table[i / 4] |= level_byte(levels, bits, i) << (8 * (i % 4)); });
  }

  // Four codes: those from the i-th four on.
  template <int i>
  QUANTIZE_DEVICE uint32_t four(uint32_t codes) const {
    if constexpr (bits == 8) {
      return codes;
    } else if constexpr (bits == 4) {
      const uint32_t own = codes >> (16 * i), places = own & 0x7777;
      return choose_bytes(choose_bytes(table[0], table[1], places), choose_bytes(table[2], table[3], places), 0x3210 | (own & 0x8888) >> 1);
    } else {
      const uint32_t own = codes >> (8 * i) & 255, pairs = (own | own << 4) & 0x0f0f;
      return choose_bytes(table[0], 0, (pairs | pairs << 2) & 0x3333);
    }
  }
};

QUANTIZE_DEVICE uint32_t word_at(const uint4& v, int i) { return vector_word(v, i); }
QUANTIZE_DEVICE uint32_t word_at(uint64_t v, int i) { return uint32_t(v >> (32 * i)); }

}  // namespace quantize::packed
