// The body of lsq_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lanes.h"
#include "lsq_kernels.h"

namespace quantize::weight {
namespace {

struct Rounded {
  Lanes value, rounded;  // x / step, bounded; and to the nearest integer
};

// lsq_divide and lsq_round for each lane.
QUANTIZE_INLINE Rounded round_lanes(Lanes x, LsqRange range) {
  const Lanes v = x * range.inverse;
  Lanes within;
  for (int i = 0; i < Lanes::parts; ++i) {
    const Lanes::Part p = v.part[i], bounded = p < -65536.f ? Lanes::Part{} - 65536.f : p;
    within.part[i] = bounded > 65536.f ? Lanes::Part{} + 65536.f : bounded;
  }
  return {within, (within + 12582912.f) - 12582912.f};
}

template <typename T>
void quantize_run(const void* source, int64_t n, LsqRange range, void* target) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes)
    store_part(lower(higher(round_lanes(load_part(x + i, n - i), range).rounded, range.low), range.high) * range.step, y + i, n - i);
}

template <typename T>
float backward_run(const void* grad, const void* source, int64_t n, LsqRange range, void* target) {
  const T *g = static_cast<const T*>(grad), *x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  Lanes sum = 0.f;
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes own = load_part(g + i, n - i);
    const Rounded r = round_lanes(load_part(x + i, n - i), range);
    const Lanes clipped = lower(higher(r.rounded, range.low), range.high);
    Lanes passed, slope;
    for (int p = 0; p < Lanes::parts; ++p) {
      const auto inside = (r.value.part[p] >= range.low) & (r.value.part[p] <= range.high);
      passed.part[p] = inside ? own.part[p] : clipped.part[p] - clipped.part[p];  // 0, or NaN
      slope.part[p] = inside ? r.rounded.part[p] - r.value.part[p] : clipped.part[p];
    }
    sum += own * slope;
    store_part(passed, y + i, n - i);
  }
  return sum_of(sum);
}

template <typename T>
constexpr LsqKernels lsq_of{quantize_run<T>, backward_run<T>};

}  // namespace
}  // namespace quantize::weight
