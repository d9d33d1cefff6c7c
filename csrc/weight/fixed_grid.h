// Activations on a grid that nothing is learned of: signs (XNOR-Net, arXiv 1603.05279) and fractions of [0, 1] (DoReFa, arXiv 1606.06160,
// section 2.4). What CPU and CUDA share. Of the input only what the gradient needs is kept, in memory order: a bit, or four.
#pragma once

#include "lsq.h"

namespace quantize::weight {

// +1 for 0.0 and -0.0; NaN stays.
QUANTIZE_HOST_DEVICE float sign_of(float x) { return x < 0.f ? -1.f : x != x ? x : 1.f; }

// Whether the gradient passes: on [-1, 1], and [0, 1]. It passes to NaN, which has made the loss NaN anyway.
QUANTIZE_HOST_DEVICE bool sign_passes(float x) { return !(x < -1.f) && !(x > 1.f); }
QUANTIZE_HOST_DEVICE bool unit_passes(float x) { return !(x < 0.f) && !(x > 1.f); }

// The derivative of Bi-Real Net's polynomial (arXiv 1808.00278), 2 - 2|x| for |x| < 1, in fifteenths of its largest value, to nearest.
constexpr int sign_slopes = 15;

QUANTIZE_HOST_DEVICE int sign_slope_code(float x) {
  const float m = bits_float(float_bits(x) & 0x7fffffffu), bounded = m < 1.f ? m : m != m ? 0.f : 1.f;
  return sign_slopes - int(lsq_round(bounded * float(sign_slopes)));
}

QUANTIZE_HOST_DEVICE float sign_slope(int code) { return float(code) * (2.f / float(sign_slopes)); }

// The codes are lsq's with a step of 1 / levels: what packed layers quantize their input to.
QUANTIZE_HOST_DEVICE LsqRange unit_range(int levels) { return lsq_range(1.f / float(levels), 0.f, levels); }

QUANTIZE_HOST_DEVICE constexpr int64_t slope_bytes(int64_t n, bool polynomial) { return polynomial ? (n + 1) / 2 : (n + 7) / 8; }

}  // namespace quantize::weight
