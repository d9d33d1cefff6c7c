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

constexpr int widths = 4, batch = lanes / widths;  // groups whose ranges are found together: their divisions take as long as 50 elements

// Sums of p (1 - p) over a group, lane by lane, for each width: as 1/4 - (p - 1/2)^2, in which p - 1/2 is the distance of level - 1/2 from
// the nearest integer. The squares are taken from their number of quarters every few times, before the sum has lost their last bits; those
// of elements on a level are quarters themselves, and leave nothing.
template <typename T>
QUANTIZE_INLINE void sum_spreads(const T* x, int64_t count, float min, const float* inverse, Lanes sum[widths]) {
  constexpr int64_t part = 16 * lanes;
  Lanes by[widths], squares[widths] = {};
  for (int b = 0; b < widths; ++b) by[b] = inverse[b], sum[b] = 0.f;
  const auto add = [&](Lanes v) __attribute__((always_inline)) {
    const Lanes f = v - min;
    for (int b = 0; b < widths; ++b) {
      const Lanes distance = from_nearest(fused_multiply_add(f, by[b], -0.5f));
      squares[b] = fused_multiply_add(distance, distance, squares[b]);
    }
  };
  for (int64_t begin = 0; begin < count; begin += part) {
    const int64_t end = least(count, begin + part);
    for (Lanes& own : squares) own = 0.f;
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) add(load_lanes(x + i));
    if (i < end) {
      float rest[lanes];
      for (int l = 0; l < lanes; ++l) rest[l] = i + l < end ? to_float(x[i + l]) : min;  // on a level
      add(load_lanes(rest));
    }
    const float quarters = 0.25f * float((end - begin + lanes - 1) / lanes);
    for (int b = 0; b < widths; ++b) sum[b] += quarters - squares[b];
  }
}

// One group, whatever its range. NaN or Inf make out NaN.
template <typename T>
void add_any_group(const T* x, int64_t count, Extent extent, double out[widths]) {
  float min = 0.f, inverse[widths];
  double square[widths];
  for (int b = 0; b < widths; ++b) {
    const Range range = load_range<T>(store_range<T>(extent, 1 << b), 1 << b);
    if (is_poisoned(range)) out[b] += range.min;
    const bool skipped = range.extreme || range.fixed_point == 0.f;  // below 1e-29 or a single value: nothing that could be shared out
    min = range.min;                                                 // stored alike for every width
    inverse[b] = skipped ? 0.f : range.fixed_point / float(1 << fraction_bits(1 << b));
    square[b] = skipped ? 0. : double(range.scale) * double(range.scale);
  }
  if (!extent.finite || (square[0] == 0. && square[widths - 1] == 0.)) return;
  Lanes sum[widths];
  sum_spreads(x, count, min, inverse, sum);
  for (int b = 0; b < widths; ++b)
    if (square[b] != 0.) out[b] += double(sum_of(sum[b])) * square[b];  // the sum of a width that was skipped may be NaN
}

// Ranges as store_range and load_range have them where these are ordinary; scale, inverse: by width, then group.
struct Ranges {
  float min[batch], scale[lanes], inverse[lanes];

  // Whether squares of a group's scales are numbers that float32 holds well: the 1-bit scale is the largest.
  bool is_ordinary(int group) const { return scale[lanes - batch + group] >= 0x1p-40f && scale[group] <= 0x1p40f; }
};

template <typename T>
QUANTIZE_INLINE Ranges find_ranges(const Extent* extents) {
  Ranges found;
  float low[lanes], high[lanes], levels[lanes];
  for (int g = 0; g < batch; ++g) {
    found.min[g] = extents[g].finite ? load_range<T>(store_range<T>(extents[g], 1), 1).min : 0.f;
    for (int b = 0; b < widths; ++b) {
      const int lane = b * batch + g;
      low[lane] = found.min[g], high[lane] = detail::positive_zero(extents[g].max), levels[lane] = float((1 << (1 << b)) - 1);
    }
  }
  Lanes scale = (load_lanes(high) - load_lanes(low)) / load_lanes(levels);
  if constexpr (T::scalar == Scalar::f32)
    for (int i = 0; i < Lanes::parts; ++i) {  // truncated, and a step up where the top level would miss the maximum
      const Lanes::Whole truncated = (Lanes::Whole)scale.part[i] & int32_t(0xffff0000u);
      const Lanes::Part top = load_lanes(low).part[i] + load_lanes(levels).part[i] * (Lanes::Part)truncated;
      const Lanes::Whole reached = top >= load_lanes(high).part[i];
      scale.part[i] = (Lanes::Part)(reached ? truncated : truncated + 0x10000);
    }
  store_lanes(scale, found.scale), store_lanes(1.f / scale, found.inverse);
  return found;
}

template <typename T>
void group_variance(const void* source, int64_t n, int64_t group_size, double out[widths]) {
  const T* x = static_cast<const T*>(source);
  for (int64_t done = 0; done < n; done += batch * group_size) {
    Extent extents[batch];
    const auto count_of = [&](int g) { return least(group_size, n - done - g * group_size); };  // 0 and less: no such group
    for (int g = 0; g < batch; ++g)
      extents[g] = count_of(g) > 0 ? lane_extent(x + done + g * group_size, count_of(g)) : Extent{0.f, 0.f, true};
    const Ranges ranges = find_ranges<T>(extents);
    Lanes total[widths] = {};
    for (int g = 0; g < batch && count_of(g) > 0; ++g) {
      const T* own = x + done + g * group_size;
      if (!extents[g].finite || !ranges.is_ordinary(g)) {
        add_any_group(own, count_of(g), extents[g], out);
        continue;
      }
      float inverse[widths];
      for (int b = 0; b < widths; ++b) inverse[b] = ranges.inverse[b * batch + g];
      Lanes sum[widths];
      sum_spreads(own, count_of(g), ranges.min[g], inverse, sum);
      for (int b = 0; b < widths; ++b) total[b] += sum[b] * (ranges.scale[b * batch + g] * ranges.scale[b * batch + g]);
    }
    for (int b = 0; b < widths; ++b) out[b] += double(sum_of(total[b]));
  }
}

}  // namespace
}  // namespace quantize::activation
