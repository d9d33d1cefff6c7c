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

// Their codes as int32.
QUANTIZE_INLINE void codes_of(Lanes x, weight::LsqRange range, Lanes::Whole out[Lanes::parts]) {
  const Lanes shifted = within(x, range) + rounder;
  const int32_t zero_point = int32_t(-range.low);
  for (int i = 0; i < Lanes::parts; ++i) out[i] = ((Lanes::Whole)shifted.part[i] + zero_point) & 255;
}

}  // namespace
}  // namespace quantize::packed
