// CPU kernels of sign_mask: one table per ISA, free of torch headers. Bit i of byte i/8 belongs to element i in memory order.
#pragma once

#include "../core/cpu_isa.h"
#include "../core/half.h"

namespace quantize::activation {

constexpr int64_t mask_bytes(int64_t n) { return (n + 7) / 8; }

// relu: y and x may be the same memory. Where n is not a multiple of 8 the last byte's upper bits are zero.
struct MaskKernels {
  void (*relu)(const void* x, int64_t n, float negative_slope, float max_value, void* y, uint8_t* mask);
  void (*apply)(const void* grad, const uint8_t* mask, int64_t n, float on, float off, void* out);
};

// max_value is NaN where there is no cap: no comparison with it holds. NaN passes its gradient on, as threshold_backward does.
QUANTIZE_HOST_DEVICE bool relu_passes(float x, float max_value) { return !(x <= 0.f) && !(x >= max_value); }

QUANTIZE_HOST_DEVICE float relu_value(float x, float negative_slope, float max_value) {
  if (x <= 0.f) return negative_slope == 0.f ? 0.f : x * negative_slope;  // -inf * 0 is not what ReLU gives
  return x >= max_value ? max_value : x;
}

QUANTIZE_HOST_DEVICE float masked_value(float grad, bool bit, float on, float off) {
  const float factor = bit ? on : off;
  return factor == 0.f ? 0.f : grad * factor;
}

const MaskKernels& mask_kernels(Isa isa, Scalar scalar);

extern const MaskKernels mask_kernels_portable[3];
extern const MaskKernels mask_kernels_avx2[3];
extern const MaskKernels mask_kernels_avx512[3];

}  // namespace quantize::activation
