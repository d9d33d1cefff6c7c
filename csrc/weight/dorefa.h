// DoReFa's weights and gradients (arXiv 1606.06160): what CPU and CUDA share.
//
// Weights of k >= 2 bits, L = 2^k - 1 (section 2.3): t = tanh(w), m = max |t| of the tensor, i = round(L (t / 2m + 1/2)) and y = step (2i -
// L), step = 1 / L. The gradient goes straight through the rounding and is exact elsewhere: of g = dL/dy,
//
//   dL/dw = (1 - t^2) (g / m - [|w| largest] sign(t) sum(g t) / m^2),
//
// shared by the weights that are equally large. One bit: y = step sign(w), step = mean |w|, straight through.
//
// Scale-adjusted training (arXiv 1912.10207): step and the gradient times s = std(w) / std(levels / L), a constant for the gradient. The
// tanh divided by its maximum multiplies the weights' deviation several times; s gives them back their own.
//
// Gradients (equation 12): of a sample with m = max |g|, v = L (g / 2m + 1/2) + noise in (-1/2, 1/2), and (2 round(v) - L) m / L.
//
// Sums are of fixed pieces, in sixteen places added up in one order (core/lanes.h), then over pieces likewise.
#pragma once

#include <cmath>

#include "diffq.h"

namespace quantize::weight {

constexpr int64_t dorefa_piece = 2048;
constexpr float dorefa_least = 0x1p-126f;  // a largest value below it counts as zero: nothing is divided by it

struct DorefaGrid {
  float half;    // 1 / 2m, or 0
  float levels;  // L
  float step;
};

struct DorefaSlope {
  float largest;  // |w|
  float factor;   // s / m
  float common;   // s sum(g t) / m^2, shared by the largest
};

// What backward needs of the forward.
struct DorefaStats {
  float largest, top, adjustment;  // max |w|, m, s
};

// tanh to about two units in the last place, odd to the bit. NaN gives 1: whoever calls it has looked for NaN before. Up to 5/8 a
// polynomial in x^2 (minimax for the relative error, 4e-9), above it 1 - 2 / (e^2x + 1).
constexpr float tanh_turn = 0.625f,
                tanh_end = 10.f;  // 1 - 2^-25 is reached before 10

QUANTIZE_HOST_DEVICE float tanh_near(float x) {
  const float m = bits_float(float_bits(x) & 0x7fffffffu), a = m < tanh_end ? m : tanh_end, u = a * a;
  const float p = (((-0.005717045f * u + 0.020650588f) * u + -0.053743497f) * u + 0.13331491f) * u + -0.33333284f;
  const float low = a + a * (u * p), high = 1.f - 2.f / (exp2_near(a * 2.88539008f) + 1.f);
  return bits_float(float_bits(a < tanh_turn ? low : high) | (float_bits(x) & 0x80000000u));
}

QUANTIZE_HOST_DEVICE float dorefa_round(float v, float levels) {
  const float i = (v + 12582912.f) - 12582912.f,
              above = i < 0.f ? 0.f : i;  // 1.5 * 2^23: to nearest, ties to even
  return levels < above ? levels : above;
}

// 2i - L of t = tanh(w), or of a gradient, whose noise is 0 < |noise| < 1/2.
QUANTIZE_HOST_DEVICE float dorefa_level(float t, float half, float levels, float noise) {
  const float i = dorefa_round((t * half + 0.5f) * levels + noise, levels);
  return (i + i) - levels;
}

QUANTIZE_HOST_DEVICE float dorefa_half(float top) { return top < dorefa_least ? 0.f : 0.5f / top; }

// Sums of d and d^2, d the distance from the first element: what a deviation is found from without cancellation.
struct DorefaSpread {
  double sum, square;
};

QUANTIZE_HOST_DEVICE double dorefa_variance(DorefaSpread s, int64_t n) { return (s.square - s.sum * s.sum / double(n)) / double(n); }

// weights, levels: of w, and of the levels 2i - L.
QUANTIZE_HOST_DEVICE float dorefa_adjustment(DorefaSpread weights, DorefaSpread levels, int64_t n, float count) {
  const double above = dorefa_variance(weights, n), below = dorefa_variance(levels, n);
  return above != above ? float(above) : below > 0 && above > 0 ? float(std::sqrt(above / below) * double(count)) : 1.f;
}

// total: sum(g t). many: how many weights are equally large. A tensor of zeros lets the gradient through as it is.
QUANTIZE_HOST_DEVICE DorefaSlope dorefa_slope(DorefaStats stats, double total, double many) {
  if (stats.top < dorefa_least) return {-1.f, stats.adjustment, 0.f};
  const double top = double(stats.top);
  return {stats.largest, float(double(stats.adjustment) / top), float(double(stats.adjustment) * total / (top * top) / many)};
}

QUANTIZE_HOST_DEVICE float dorefa_gradient(float g, float w, DorefaSlope slope) {
  const float t = tanh_near(w), m = bits_float(float_bits(w) & 0x7fffffffu), own = g * slope.factor;
  const float rest = m == slope.largest ? own - (w < 0.f ? 0.f - slope.common : slope.common) : own;
  return rest * ((1.f - t) * (1.f + t));
}

// What a sample's gradient is made with; largest: NaN if any of it is NaN or infinite.
struct GradientGrid {
  float half, unit;  // 1 / 2m; m / L
};

QUANTIZE_HOST_DEVICE GradientGrid gradient_grid(float largest, float levels) {
  const bool zero = largest < dorefa_least;
  return {zero ? 0.f : 0.5f / largest, zero ? 0.f : largest / levels};
}

}  // namespace quantize::weight
