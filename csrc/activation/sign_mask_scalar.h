// sign_mask element by element: the portable ISA, the 16-bit types, and the ends that the vector kernels leave.
#pragma once

#include "sign_mask_kernels.h"

namespace quantize::activation {
namespace {  // every ISA's object has its own copy, compiled for its own instructions

template <typename T>
void scalar_relu(const void* source, int64_t n, float negative_slope, float max_value, void* target, uint8_t* mask) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t byte = 0; byte < mask_bytes(n); ++byte) {
    const int count = n - 8 * byte < 8 ? int(n - 8 * byte) : 8;
    unsigned bits = 0;
    for (int i = 0; i < count; ++i) {
      const float value = to_float(x[8 * byte + i]);
      bits |= unsigned(relu_passes(value, max_value)) << i;
      y[8 * byte + i] = round_nearest(relu_value(value, negative_slope, max_value), T{});
    }
    mask[byte] = uint8_t(bits);
  }
}

template <typename T>
void scalar_apply(const void* source, const uint8_t* mask, int64_t n, float on, float off, void* target) {
  const T* grad = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  for (int64_t i = 0; i < n; ++i) out[i] = round_nearest(masked_value(to_float(grad[i]), mask[i / 8] >> (i % 8) & 1, on, off), T{});
}

}  // namespace
}  // namespace quantize::activation
