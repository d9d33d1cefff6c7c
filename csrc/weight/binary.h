// Binary weights with a scale for each filter (XNOR-Net, arXiv 1603.05279): what CPU and CUDA share.
//
//   v = w - mean of w over the input channels,   c = clamp(v, -limit, limit),   y = sign(c) alpha,   alpha = mean |c| of the filter.
//
// sign(0) = +1. The gradient is that formula's, with d sign(c) / dc = 1: of g = dL/dy, with n weights in the filter,
//
//   dL/dc = g alpha + sign(c) sum(g sign(c)) / n,   dL/dv = dL/dc where |v| <= limit, else 0,   dL/dw = dL/dv - its mean over channels.
//
// The paper's section 3.1 has (1/n + alpha dsign/dw) in place of the first, which leaves out what a weight does to the others of its filter
// through their scale.
//
// A filter is a row [channels, taps]. Sixteen partial sums in fixed places, added up in one order (core/lanes.h): for a tap, of the
// channels i % 16; for a row, of the places p % 16; over rows, of the rows r % 16.
#pragma once

#include "../core/half.h"

namespace quantize::weight {

struct BinaryShape {
  int64_t channels, taps;  // one tap where nothing is centred
  bool centred;

  QUANTIZE_HOST_DEVICE int64_t elements() const { return channels * taps; }
};

constexpr int binary_sums = 16;

// ReCU (arXiv 2103.12369): the limit is the quantile tau of a Laplace distribution with the layer's mean magnitude, -ln(2 - 2 tau) times
// that. `share` is the factor, or with `relative` false the limit itself (XNOR-Net's is 1).
QUANTIZE_HOST_DEVICE float binary_limit(double total, int64_t n, double share) { return float(share * (total / double(n))); }

// part: [16]; joined as core/lanes.h joins lanes.
QUANTIZE_HOST_DEVICE double join_parts(const double* part) {
  double four[4];
  for (int i = 0; i < 4; ++i) four[i] = (part[i] + part[i + 8]) + (part[i + 4] + part[i + 12]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

QUANTIZE_HOST_DEVICE float clipped_magnitude(float v, float limit) {
  const float m = bits_float(float_bits(v) & 0x7fffffffu);
  return limit < m ? limit : m;
}

// What a weight off the limits gets of the gradient g; common: sum(g sign) / n. NaN passes.
QUANTIZE_HOST_DEVICE float binary_slope(float g, float v, float scale, float common, float limit) {
  const float m = bits_float(float_bits(v) & 0x7fffffffu);
  return m > limit ? 0.f : g * scale + (v < 0.f ? 0.f - common : common);
}

}  // namespace quantize::weight
