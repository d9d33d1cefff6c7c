// CPU kernels of sign_mask: one table per ISA, free of torch headers. Bit i of byte i/8 belongs to element i in memory order.
#pragma once

#include "../core/cpu_isa.h"
#include "../core/half.h"

namespace quantize::activation {

constexpr int64_t mask_bytes(int64_t n) { return (n + 7) / 8; }

// Compared in float32, rounded to the type then, as PyTorch does. No end: NaN, with which no comparison holds.
struct Clip {
  float low, high;
  float slope;  // below `low`, if that is zero
};

// clip: y and x may be the same memory. Where n is not a multiple of 8 the last byte's upper bits are zero.
struct MaskKernels {
  void (*clip)(const void* x, int64_t n, Clip clip, void* y, uint8_t* mask);
  void (*apply)(const void* grad, const uint8_t* mask, int64_t n, float on, float off, void* out);
};

// NaN passes its gradient on, as threshold_backward and hardtanh_backward have it.
QUANTIZE_HOST_DEVICE bool clip_passes(float x, Clip clip) { return !(x <= clip.low) && !(x >= clip.high); }

QUANTIZE_HOST_DEVICE float clip_value(float x, Clip clip) {
  if (x <= clip.low) return clip.slope == 0.f ? clip.low : x * clip.slope;  // -inf * 0 is not what ReLU gives
  return x >= clip.high ? clip.high : x;
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
