// The body of diffq_kernels.h's noise on activations, included by one file per ISA.
#pragma once

#include "diffq_kernels.h"
#include "noise_run.h"

namespace quantize::weight {
namespace {

template <typename T>
void clip_with_noise(const ClippedNoise& t, const void* source, int64_t begin, int64_t end, void* target) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  alignas(64) float noise[piece + 2 * block];
  for (int64_t next; begin < end; begin = next) {
    next = std::min(end, begin / piece * piece + piece);
    const float* own = draw(t.seed, 0, nullptr, begin, next, noise);
    for (int64_t i = begin; i < next; i += lanes)
      store_part(lower(higher(load_part(x + i, next - i), t.low), t.high) + load_lanes(own + i - begin) * t.scale, y + i, next - i);
  }
}

template <typename T>
ClippedSums clip_backward(const ClippedNoise& t, const void* gradient, const void* source, int64_t n, int64_t index, void* target) {
  const T *grad = static_cast<const T*>(gradient), *x = static_cast<const T*>(source);
  T* grad_x = static_cast<T*>(target);
  alignas(64) float noise[piece + 2 * block];
  const int64_t begin = index * piece, end = std::min(n, begin + piece);
  draw(t.seed, 0, nullptr, begin, end, noise);
  Lanes by_noise = 0.f, above = 0.f, below = 0.f;
  for (int64_t i = begin; i < end; i += lanes) {
    const Lanes g = load_part(grad + i, end - i), v = load_part(x + i, end - i);
    Lanes high, low, inside;
    for (int p = 0; p < Lanes::parts; ++p) {
      const auto is_above = v.part[p] > t.high, is_below = v.part[p] < t.low;
      high.part[p] = is_above ? g.part[p] : Lanes::Part{};
      low.part[p] = is_below ? g.part[p] : Lanes::Part{};
      inside.part[p] = is_above | is_below ? Lanes::Part{} : g.part[p];
    }
    by_noise += g * load_lanes(noise + i - begin), above += high, below += low;
    store_part(inside, grad_x + i, end - i);
  }
  return {sum_of(by_noise), sum_of(above), sum_of(below)};
}

}  // namespace
}  // namespace quantize::weight
