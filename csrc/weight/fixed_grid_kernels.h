// CPU kernels of fixed_grid: one body, compiled once per ISA, the same bits from each.
#pragma once

#include "../core/cpu_isa.h"
#include "fixed_grid.h"

namespace quantize::weight {

// kept: bit i % 8 of byte i / 8, or the low four bits of byte i / 2 for even i. What is behind the last element is zero.
struct FixedGridKernels {
  void (*sign)(const void* x, int64_t n, void* y, uint8_t* kept);
  void (*sign_polynomial)(const void* x, int64_t n, void* y, uint8_t* kept);
  void (*unit)(const void* x, int64_t n, LsqRange range, void* y, uint8_t* kept);
  // grad_x = grad where the bit is set, else 0; grad times the code's slope.
  void (*pass)(const void* grad, const uint8_t* kept, int64_t n, void* grad_x);
  void (*slope)(const void* grad, const uint8_t* kept, int64_t n, void* grad_x);
};

// Indexed by Scalar.
extern const FixedGridKernels fixed_grid_portable[3];
extern const FixedGridKernels fixed_grid_avx2[3];
extern const FixedGridKernels fixed_grid_avx512[3];

inline const FixedGridKernels& fixed_grid_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, fixed_grid)[int(scalar)]; }

}  // namespace quantize::weight
