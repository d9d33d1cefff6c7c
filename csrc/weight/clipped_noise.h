// The arguments of clipped_noise, the same for every backend.
#pragma once

#include "../core/checks.h"
#include "../core/seed.h"
#include "diffq_kernels.h"

namespace quantize::weight {

// ends: low, high, and what the noise is multiplied by.
inline Scalar check_clipped(const at::Tensor& x, const at::Tensor& ends) {
  const char* op = "clipped_noise";
  check_dtype(op, "ends", ends, at::kFloat);
  check_numel(op, "ends", ends, 3);
  check_same_device(op, "ends", ends, x);
  return check_scalar(op, "x", x.scalar_type());
}

inline Scalar check_clipped_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& ends) {
  const char* op = "clipped_noise_backward";
  check_dtype(op, "grad", grad, x.scalar_type());
  check_numel(op, "grad", grad, x.numel());
  check_same_device(op, "grad", grad, x);
  return check_clipped(x, ends);
}

}  // namespace quantize::weight
