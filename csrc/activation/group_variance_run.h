// The body of group_variance_kernels.h, included by one file per ISA.
#pragma once

#include "group_quantize_scalar.h"
#include "group_variance_kernels.h"

namespace quantize::activation {
namespace {

constexpr int lanes = 16;

struct LaneExtent {
  float min[lanes], max[lanes], poison[lanes];
};

template <typename T>
Extent lane_extent(const T* x, int64_t n) {
  if (n < lanes) return scalar_extent(x, n);
  LaneExtent e;
  for (int l = 0; l < lanes; ++l) e.min[l] = e.max[l] = to_float(x[l]), e.poison[l] = 0.f;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int l = 0; l < lanes; ++l) {
      const float v = to_float(x[i + l]);
      e.min[l] = v < e.min[l] ? v : e.min[l];
      e.max[l] = v > e.max[l] ? v : e.max[l];
      e.poison[l] += v * 0.f;
    }
  Extent all = scalar_extent(x + n - lanes, lanes);
  for (int l = 0; l < lanes; ++l) {
    all.min = e.min[l] < all.min ? e.min[l] : all.min;
    all.max = e.max[l] > all.max ? e.max[l] : all.max;
    all.finite = all.finite && e.poison[l] == 0.f;
  }
  return all;
}

// f - floor(f) for 0 <= f < 2^31, without the floor that baseline x86-64 lacks.
QUANTIZE_HOST_DEVICE float spread_of(float x, float min, float inverse) {
  const float f = (x - min) * inverse, p = f - float(int32_t(f));
  return p * (1.f - p);
}

template <typename T>
void group_variance(const void* source, int64_t n, int64_t group_size, double out[4]) {
  const T* x = static_cast<const T*>(source);
  for (int64_t begin = 0; begin < n; begin += group_size, x += group_size) {
    const int64_t count = least(group_size, n - begin);
    const Extent extent = lane_extent(x, count);
    for (int b = 0; b < 4; ++b) {
      const Range range = load_range<T>(store_range<T>(extent, 1 << b), 1 << b);
      if (is_poisoned(range)) out[b] += range.min;
      if (range.extreme || range.fixed_point == 0.f) continue;  // below 1e-29 or a single value: nothing that could be shared out
      const float inverse = 1.f / range.scale;
      float sum[lanes] = {};
      int64_t i = 0;
      for (; i + lanes <= count; i += lanes)
        for (int l = 0; l < lanes; ++l) sum[l] += spread_of(to_float(x[i + l]), range.min, inverse);
      double total = 0;
      for (; i < count; ++i) total += spread_of(to_float(x[i]), range.min, inverse);
      for (int l = 0; l < lanes; ++l) total += sum[l];
      out[b] += total * double(range.scale) * double(range.scale);
    }
  }
}

}  // namespace
}  // namespace quantize::activation
