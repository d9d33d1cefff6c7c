// CPU kernels of binary: one body, compiled once per ISA, the same bits from each.
#pragma once

#include "../core/cpu_isa.h"
#include "binary.h"

namespace quantize::weight {

// All of one row. mean: [taps]. tile: room for 16 * taps floats.
struct BinaryKernels {
  void (*centre)(const void* w, BinaryShape shape, float* mean, float* tile);
  // Sum of |c|; NaN if any weight is NaN or infinite.
  float (*magnitude)(const void* w, BinaryShape shape, const float* mean, float limit, float* tile);
  void (*write)(const void* w, BinaryShape shape, const float* mean, float scale, float* tile, void* y);
  // grad_w = factor * dL/dw. sums: room for as much as tile.
  void (*backward)(const void* grad, const void* w, BinaryShape shape, const float* mean, float scale, float limit, float factor,
                   float* tile, float* sums, void* grad_w);
};

// Indexed by Scalar.
extern const BinaryKernels binary_portable[3];
extern const BinaryKernels binary_avx2[3];
extern const BinaryKernels binary_avx512[3];

inline const BinaryKernels& binary_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, binary)[int(scalar)]; }

}  // namespace quantize::weight
