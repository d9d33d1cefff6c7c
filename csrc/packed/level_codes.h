// Sixteen activations' levels, included by one file per ISA.
#pragma once

#include "../weight/lsq_run.h"

namespace quantize::packed {
namespace {

// Codes of sixteen activations as int32. No code is NaN: it becomes the lower end's (higher's first argument is what NaN gives way to).
QUANTIZE_INLINE void codes_of(Lanes x, weight::LsqRange range, Lanes::Whole out[Lanes::parts]) {
  const Lanes clipped = lower(higher(range.low, weight::round_lanes(x, range).rounded), range.high);
  for (int i = 0; i < Lanes::parts; ++i)  // 1.5 * 2^23 leaves the integer at the end of the mantissa
    out[i] = (Lanes::Whole)((clipped.part[i] - range.low) + 12582912.f) & 255;
}

}  // namespace
}  // namespace quantize::packed
