// The body of smooth_kernels.h, included by one file per ISA.
#pragma once

#include "../core/exp2_lanes.h"
#include "../core/lane_mask.h"
#include "smooth_kernels.h"

namespace quantize::layers {
namespace {

template <typename T, Smooth function>
void smooth_lanes(const void* source, int64_t n, void* target) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_lanes(smooth_derivative<function>(load_lanes(x + i)), y + i);
  if (i < n) store_part(smooth_derivative<function>(load_part(x + i, n - i)), y + i, n - i);
}

template <typename T>
void multiply_lanes(const void* first, const void* second, int64_t n, void* target) {
  const T *a = static_cast<const T*>(first), *b = static_cast<const T*>(second);
  T* y = static_cast<T*>(target);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_lanes(load_lanes(a + i) * load_lanes(b + i), y + i);
  if (i < n) store_part(load_part(a + i, n - i) * load_part(b + i, n - i), y + i, n - i);
}

#define QUANTIZE_MULTIPLY_KERNELS \
  { multiply_lanes<F32>, multiply_lanes<F16>, multiply_lanes<BF16> }
#define QUANTIZE_SMOOTH_KERNELS_OF(T)                                                                                                \
  {                                                                                                                                  \
    smooth_lanes<T, Smooth::silu>, smooth_lanes<T, Smooth::hardswish>, smooth_lanes<T, Smooth::mish>, smooth_lanes<T, Smooth::gelu>, \
        smooth_lanes<T, Smooth::gelu_tanh>                                                                                           \
  }
#define QUANTIZE_SMOOTH_KERNELS \
  { QUANTIZE_SMOOTH_KERNELS_OF(F32), QUANTIZE_SMOOTH_KERNELS_OF(F16), QUANTIZE_SMOOTH_KERNELS_OF(BF16) }

}  // namespace
}  // namespace quantize::layers
