// Learned step size quantization (LSQ, arXiv 1902.08153) of activations: what every backend and the packed kernels share.
//
// code = clamp(round(x / step) + zero_point, 0, 2^bits - 1), to nearest, ties to even; y = step * (code - zero_point).
#pragma once

#include "../core/half.h"

namespace quantize::weight {

struct LsqRange {
  float step, inverse;  // a step that training drove to zero or below counts as 2^-100
  float low, high;      // of round(x / step): -zero_point and 2^bits - 1 - zero_point
};

QUANTIZE_HOST_DEVICE LsqRange lsq_range(float step, float zero_point, int bits) {
  const float positive = step > 0x1p-100f ? step : 0x1p-100f;
  return {positive, 1.f / positive, -zero_point, float((1 << bits) - 1) - zero_point};
}

// round(x / step), clipped far outside of any range, where adding 1.5 * 2^23 rounds to nearest even. NaN becomes the lower end.
QUANTIZE_HOST_DEVICE float lsq_round(float x, LsqRange range) {
  const float v = x * range.inverse, bounded = v > -65536.f ? v : -65536.f, within = bounded < 65536.f ? bounded : 65536.f;
  return (within + 12582912.f) - 12582912.f;
}

QUANTIZE_HOST_DEVICE float lsq_clip(float rounded, LsqRange range) {
  return rounded < range.low ? range.low : rounded > range.high ? range.high : rounded;
}

}  // namespace quantize::weight
