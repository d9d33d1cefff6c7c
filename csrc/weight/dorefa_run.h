// The body of dorefa_kernels.h, included by one file per ISA.
#pragma once

#include <algorithm>

#include "dorefa_kernels.h"
#include "noise_run.h"

namespace quantize::weight {
namespace {

// tanh_near for each lane.
QUANTIZE_INLINE Lanes tanh_lanes(Lanes x) {
  const Lanes m = magnitude(x);
  Lanes a;
  for (int i = 0; i < Lanes::parts; ++i) a.part[i] = m.part[i] < tanh_end ? m.part[i] : Lanes::Part{} + tanh_end;
  const Lanes u = a * a;
  Lanes p = -0.005717045f;
  for (float term : {0.020650588f, -0.053743497f, 0.13331491f, -0.33333284f}) p = p * u + term;
  const Lanes low = a + a * (u * p), high = Lanes(1.f) - Lanes(2.f) / (exp2_near(a * 2.88539008f) + 1.f);
  Lanes t;
  for (int i = 0; i < Lanes::parts; ++i) {
    const Lanes::Part own = a.part[i] < tanh_turn ? low.part[i] : high.part[i];
    t.part[i] = (Lanes::Part)((Lanes::Whole)own | ((Lanes::Whole)x.part[i] & int32_t(0x80000000u)));
  }
  return t;
}

// dorefa_level for each lane.
QUANTIZE_INLINE Lanes dorefa_levels(Lanes t, float half, float levels, Lanes noise) {
  const Lanes v = (t * half + 0.5f) * levels + noise, i = lower(higher((v + 12582912.f) - 12582912.f, 0.f), levels);
  return (i + i) - levels;
}

template <typename T>
float largest_of(const void* source, int64_t n) {
  const T* x = static_cast<const T*>(source);
  Lanes high = 0.f, poison = 0.f;
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(x + i, n - i);
    high = higher(high, magnitude(v)), poison += v * 0.f;
  }
  return reduce_lanes(high, [](auto a, auto b) { return b > a ? b : a; }) + sum_of(poison);
}

template <typename T>
float magnitudes_of(const void* source, int64_t n) {
  const T* x = static_cast<const T*>(source);
  Lanes total = 0.f, poison = 0.f;
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(x + i, n - i);
    total += magnitude(v), poison += v * 0.f;
  }
  return sum_of(total) + sum_of(poison);
}

// value(lanes of w): what is spread.
template <typename T, typename Value>
QUANTIZE_INLINE DorefaPart spread_about(const void* source, int64_t n, float first, const Value& value) {
  const T* w = static_cast<const T*>(source);
  Lanes sum = 0.f, square = 0.f;
  for (int64_t i = 0; i < n; i += lanes) {
    Lanes d = value(load_part(w + i, n - i)) - first;
    if (n - i < lanes) d = first_lanes(d, n - i);
    sum += d, square += d * d;
  }
  return {sum_of(sum), sum_of(square)};
}

template <typename T>
DorefaPart spread_run(const void* source, int64_t n, float first) {
  return spread_about<T>(
      source, n, first, [](Lanes w) __attribute__((always_inline)) { return w; });
}

template <typename T>
DorefaPart spread_of_levels_run(const void* source, int64_t n, DorefaGrid grid, float first) {
  return spread_about<T>(
      source, n, first, [&](Lanes w) __attribute__((always_inline)) { return dorefa_levels(tanh_lanes(w), grid.half, grid.levels, 0.f); });
}

template <typename T>
void quantize_by_tanh(const void* source, int64_t n, DorefaGrid grid, void* target) {
  const T* w = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes)
    store_part(dorefa_levels(tanh_lanes(load_part(w + i, n - i)), grid.half, grid.levels, 0.f) * grid.step, y + i, n - i);
}

template <typename T>
void sign_with_step(const void* source, int64_t n, float step, void* target) {
  const T* w = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) store_part(with_sign(step, load_part(w + i, n - i)), y + i, n - i);
}

template <typename T>
DorefaProducts products_run(const void* grad, const void* source, int64_t n, float largest) {
  const T *g = static_cast<const T*>(grad), *w = static_cast<const T*>(source);
  Lanes product = 0.f, count = 0.f;
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(w + i, n - i), m = magnitude(v);
    product += load_part(g + i, n - i) * tanh_lanes(v);
    Lanes is_largest;
    for (int p = 0; p < Lanes::parts; ++p) is_largest.part[p] = m.part[p] == largest ? Lanes::Part{} + 1.f : Lanes::Part{};
    count += n - i < lanes ? first_lanes(is_largest, n - i) : is_largest;
  }
  return {sum_of(product), sum_of(count)};
}

template <typename T>
void dorefa_backward_run(const void* grad, const void* source, int64_t n, DorefaSlope slope, void* target) {
  const T *g = static_cast<const T*>(grad), *w = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(w + i, n - i), t = tanh_lanes(v), m = magnitude(v), common = with_sign(slope.common, v);
    Lanes own = load_part(g + i, n - i) * slope.factor;
    for (int p = 0; p < Lanes::parts; ++p) own.part[p] = m.part[p] == slope.largest ? own.part[p] - common.part[p] : own.part[p];
    store_part(own * ((Lanes(1.f) - t) * (Lanes(1.f) + t)), out + i, n - i);
  }
}

template <typename T>
void quantize_gradient_run(Seed seed, const void* source, int64_t begin, int64_t end, int64_t elements, const GradientGrid* grids,
                           float levels, void* target) {
  const T* g = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  alignas(64) float noise[piece + 2 * block];
  for (int64_t next; begin < end; begin = next) {
    next = std::min(end, begin / piece * piece + piece);
    const float* own = draw(seed, 0, nullptr, begin, next, noise);
    for_units(begin, next, elements, [&](int64_t sample, int64_t from, int64_t to) {
      const GradientGrid grid = grids[sample];
      for (int64_t i = from; i < to; i += lanes)
        store_part(dorefa_levels(load_part(g + begin + i, to - i), grid.half, levels, load_part(own + i, to - i)) * grid.unit,
                   y + begin + i, to - i);
    });
  }
}

template <typename T>
constexpr DorefaKernels dorefa_of{largest_of<T>,     magnitudes_of<T>, spread_run<T>,          spread_of_levels_run<T>, quantize_by_tanh<T>,
                                  sign_with_step<T>, products_run<T>,  dorefa_backward_run<T>, quantize_gradient_run<T>};

}  // namespace
}  // namespace quantize::weight
