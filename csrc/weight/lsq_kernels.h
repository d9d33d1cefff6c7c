// CPU kernels of lsq: one body, compiled once per ISA, the same bits from each.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"
#include "lsq.h"

namespace quantize::weight {

struct LsqKernels {
  void (*quantize)(const void* x, int64_t n, LsqRange range, void* y);
  // grad_x = grad where x / step is in range, NaN where x is, else 0. Returns the sum of grad * dy/dstep: round(x / step) - x / step in
  // range, its bound outside (equation 3 of the paper), NaN where x is.
  float (*backward)(const void* grad, const void* x, int64_t n, LsqRange range, void* grad_x);
};

// Indexed by Scalar.
extern const LsqKernels lsq_portable[3];
extern const LsqKernels lsq_avx2[3];
extern const LsqKernels lsq_avx512[3];

inline const LsqKernels& lsq_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, lsq)[int(scalar)]; }

}  // namespace quantize::weight
