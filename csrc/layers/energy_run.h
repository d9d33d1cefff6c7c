// The body of energy_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lanes.h"
#include "energy_kernels.h"

namespace quantize::layers {
namespace {

template <typename T>
double energy(const void* source, int64_t n) {
  constexpr int chains = 4;
  constexpr int64_t stretch = 4096;  // elements that floats add up
  const T* x = static_cast<const T*>(source);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += stretch) {
    const int64_t end = begin + stretch < n ? begin + stretch : n;
    Lanes sum[chains] = {0.f, 0.f, 0.f, 0.f};
    int64_t i = begin;
    for (; i + chains * lanes <= end; i += chains * lanes)
      for (int c = 0; c < chains; ++c) {
        const Lanes v = load_lanes(x + i + c * lanes);
        sum[c] += v * v;
      }
    for (; i < end; i += lanes) {
      const Lanes v = load_part(x + i, end - i);
      sum[0] += v * v;
    }
    total += double(sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  return total;
}

#define QUANTIZE_ENERGY_KERNELS \
  { energy<F32>, energy<F16>, energy<BF16> }

}  // namespace
}  // namespace quantize::layers
