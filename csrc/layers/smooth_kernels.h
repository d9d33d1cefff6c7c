// CPU kernels of smooth_derivative: one table per ISA. Torch-free.
#pragma once

#include "../core/cpu_isa.h"
#include "smooth.h"

namespace quantize::layers {

using SmoothKernel = void (*)(const void* x, int64_t n, void* y);

// Indexed by Scalar and Smooth.
extern const SmoothKernel smooth_portable[3][5];
extern const SmoothKernel smooth_avx2[3][5];
extern const SmoothKernel smooth_avx512[3][5];

inline SmoothKernel smooth_kernel(Isa isa, Scalar scalar, Smooth function) {
  return QUANTIZE_BY_ISA(isa, smooth)[int(scalar)][int(function)];
}

}  // namespace quantize::layers
