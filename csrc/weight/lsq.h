// Learned step size quantization (LSQ, arXiv 1902.08153): what every backend and the packed kernels share.
//
// code = clamp(round(x / step) + zero_point, 0, levels), to nearest, ties to even; y = step * (code - zero_point). Activations have 2^bits
// - 1 levels; weights, symmetric about zero, 2^bits - 2 and their zero point in the middle.
//
// NaN stays NaN, in y, grad_x and the step's gradient: a training that diverged must not look healthy. Only the packed kernels' integers
// have no NaN (packed/image_run.h).
#pragma once

#include "../core/half.h"

namespace quantize::weight {

struct LsqRange {
  float step, inverse;  // a step that training drove to zero or below counts as 2^-100
  float low, high;      // of round(x / step): -zero_point and levels - zero_point
};

QUANTIZE_HOST_DEVICE LsqRange lsq_range(float step, float zero_point, int levels) {
  const float positive = step <= 0x1p-100f ? 0x1p-100f : step;
  return {positive, 1.f / positive, -zero_point, float(levels) - zero_point};
}

// x / step, clipped far outside of any range, so that lsq_round holds.
QUANTIZE_HOST_DEVICE float lsq_divide(float x, LsqRange range) {
  const float v = x * range.inverse, bounded = v < -65536.f ? -65536.f : v;
  return bounded > 65536.f ? 65536.f : bounded;
}

// To nearest even: 1.5 * 2^23 leaves no room for a fraction.
QUANTIZE_HOST_DEVICE float lsq_round(float v) { return (v + 12582912.f) - 12582912.f; }

QUANTIZE_HOST_DEVICE float lsq_clip(float rounded, LsqRange range) {
  return rounded < range.low ? range.low : rounded > range.high ? range.high : rounded;
}

}  // namespace quantize::weight
