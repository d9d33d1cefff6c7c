// The arguments of allocate_bits and allocation_curve, the same for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/checks.h"

namespace quantize::activation {

// One number for each sample and each of 1, 2, 4 and 8 bits.
inline void check_by_bits(const char* op, const char* argument, const at::Tensor& tensor) {
  check_dtype(op, argument, tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(1) == 4, op, ": ", argument, " must be [N, 4]; got ", tensor.sizes());
}

inline void check_allocate(const at::Tensor& variance, int64_t bit_budget, int64_t max_bits) {
  const char* op = "allocate_bits";
  check_bits(op, max_bits);
  check_by_bits(op, "variance", variance);
  TORCH_CHECK_VALUE(bit_budget >= variance.size(0), op, ": bit_budget must give each of ", variance.size(0), " samples a bit; got ",
                    bit_budget);
}

inline void check_curve(const at::Tensor& variance, const at::Tensor& cost, int64_t max_bits) {
  const char* op = "allocation_curve";
  check_bits(op, max_bits);
  check_by_bits(op, "variance", variance);
  check_by_bits(op, "cost", cost);
  check_numel(op, "cost", cost, variance.numel());
  check_same_device(op, "cost", cost, variance);
}

}  // namespace quantize::activation
