// CPU kernels of smooth_derivative, and products: one table per ISA. Torch-free.
#pragma once

#include "../core/cpu_isa.h"
#include "smooth.h"

namespace quantize::layers {

using SmoothKernel = void (*)(const void* x, int64_t n, void* y);

// Indexed by Scalar and Smooth.
extern const SmoothKernel smooth_portable[3][5];
extern const SmoothKernel smooth_avx2[3][5];
extern const SmoothKernel smooth_avx512[3][5];

// y = a * b, in float32 and rounded; y may be a.
using MultiplyKernel = void (*)(const void* a, const void* b, int64_t n, void* y);

// Indexed by Scalar.
extern const MultiplyKernel multiply_portable[3];
extern const MultiplyKernel multiply_avx2[3];
extern const MultiplyKernel multiply_avx512[3];

inline MultiplyKernel multiply_kernel(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, multiply)[int(scalar)]; }

inline SmoothKernel smooth_kernel(Isa isa, Scalar scalar, Smooth function) {
  return QUANTIZE_BY_ISA(isa, smooth)[int(scalar)][int(function)];
}

}  // namespace quantize::layers
