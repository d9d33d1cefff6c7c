// CPU kernels of group_variance. One body, compiled once per ISA: sixteen independent sums that any vector width can hold, added up in
// one order, so that every ISA returns the same bits.
#pragma once

#include "group_quantize_kernels.h"

namespace quantize::activation {

// Adds the variance of packing x[0..n) in groups at 1, 2, 4 and 8 bits to out[0..4): sum of scale^2 p (1 - p), p the fractional part of
// (x - min)/scale. NaN or Inf in a group makes it NaN.
using GroupVarianceKernel = void (*)(const void* x, int64_t n, int64_t group_size, double out[4]);

extern const GroupVarianceKernel group_variance_portable[3];
extern const GroupVarianceKernel group_variance_avx2[3];
extern const GroupVarianceKernel group_variance_avx512[3];

inline GroupVarianceKernel group_variance_kernel(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, group_variance)[int(scalar)]; }

}  // namespace quantize::activation
