// The body of group_variance_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lanes.h"
#include "group_quantize_scalar.h"
#include "group_variance_kernels.h"

namespace quantize::activation {
namespace {

template <typename T>
Extent lane_extent(const T* x, int64_t n) {
  if (n < lanes) return scalar_extent(x, n);
  Lanes low = load_lanes(x), high = low, poison = low * 0.f;
  const auto join = [&](const T* p) __attribute__((always_inline)) {
    const Lanes v = load_lanes(p);
    low = lower(low, v), high = higher(high, v), poison += v * 0.f;  // NaN and Inf leave NaN
  };
  int64_t i = lanes;
  for (; i + lanes <= n; i += lanes) join(x + i);
  if (i < n) join(x + n - lanes);  // overlaps what was seen: a minimum does not mind
  return {reduce_lanes(low, [](auto a, auto b) { return b < a ? b : a; }), reduce_lanes(high, [](auto a, auto b) { return b > a ? b : a; }),
          sum_of(poison) == 0.f};
}

template <typename T>
void group_variance(const void* source, int64_t n, int64_t group_size, double out[4]) {
  const T* x = static_cast<const T*>(source);
  for (int64_t begin = 0; begin < n; begin += group_size, x += group_size) {
    const int64_t count = least(group_size, n - begin);
    const Extent extent = lane_extent(x, count);
    float min = 0.f, inverse[4];
    double square[4];
    for (int b = 0; b < 4; ++b) {
      const Range range = load_range<T>(store_range<T>(extent, 1 << b), 1 << b);
      if (is_poisoned(range)) out[b] += range.min;
      const bool skipped = range.extreme || range.fixed_point == 0.f;  // below 1e-29 or a single value: nothing that could be shared out
      min = range.min;
      inverse[b] = skipped ? 0.f : range.fixed_point / float(1 << fraction_bits(1 << b));
      square[b] = skipped ? 0. : double(range.scale) * double(range.scale);
    }
    if (!extent.finite) continue;
    Lanes sum[4] = {};
    const auto add = [&](Lanes v) __attribute__((always_inline)) {
      const Lanes f = v - min;  // the minimum is stored alike for every width
      for (int b = 0; b < 4; ++b) {
        const Lanes p = fraction(f * inverse[b]);
        sum[b] += p * (1.f - p);
      }
    };
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) add(load_lanes(x + i));
    if (i < count) {
      float rest[lanes];
      for (int l = 0; l < lanes; ++l) rest[l] = i + l < count ? to_float(x[i + l]) : min;  // whose fraction is 0
      add(load_lanes(rest));
    }
    for (int b = 0; b < 4; ++b)
      if (square[b] != 0.) out[b] += double(sum_of(sum[b])) * square[b];  // the sum of a width that was skipped may be NaN
  }
}

}  // namespace
}  // namespace quantize::activation
