// Sixteen activations' levels, included by one file per ISA.
#pragma once

#include "../weight/lsq_run.h"

namespace quantize::packed {
namespace {

constexpr float rounder = 12582912.f;  // 1.5 * 2^23, added: leaves the nearest integer at the end of the mantissa, ties to even

// lsq_clip(lsq_round(lsq_divide(x))), the other way round: the ends are whole numbers. No level is NaN: it becomes the lower end
// (higher's first argument is what NaN gives way to).
QUANTIZE_INLINE Lanes within(Lanes x, weight::LsqRange range) { return lower(higher(range.low, x * range.inverse), range.high); }

// Levels of sixteen activations less the zero point.
QUANTIZE_INLINE Lanes levels_of(Lanes x, weight::LsqRange range) { return (within(x, range) + rounder) - rounder; }

// Their codes as int32, `zero_point` above the levels.
QUANTIZE_INLINE void codes_of(Lanes x, weight::LsqRange range, int32_t zero_point, Lanes::Whole out[Lanes::parts]) {
  const Lanes shifted = within(x, range) + rounder;
  for (int i = 0; i < Lanes::parts; ++i) out[i] = ((Lanes::Whole)shifted.part[i] + zero_point) & 255;
}

// Sixteen codes as bytes.
QUANTIZE_INLINE void store_codes(Lanes x, weight::LsqRange range, int32_t zero_point, uint8_t* bytes) {
  using Bytes = uint8_t __attribute__((vector_size(Lanes::width)));
  Lanes::Whole codes[Lanes::parts];
  codes_of(x, range, zero_point, codes);
  for (int i = 0; i < Lanes::parts; ++i) {
    const Bytes own = __builtin_convertvector(codes[i], Bytes);
    std::memcpy(bytes + i * Lanes::width, &own, sizeof own);
  }
}

// `channels` bytes, in words; zeros fill the last one.
QUANTIZE_INLINE void store_words(const uint8_t* bytes, int64_t channels, uint8_t* target) {
  uint32_t word;
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) std::memcpy(target + c, bytes + c, 4);
  if (c == channels) return;
  std::memcpy(&word, bytes + c, 4);
  word &= (1u << (8 * (channels - c))) - 1;
  std::memcpy(target + c, &word, 4);
}

}  // namespace
}  // namespace quantize::packed
