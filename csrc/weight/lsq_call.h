// The arguments of lsq's ops, the same for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "../core/checks.h"

namespace quantize::weight {

inline Scalar check_lsq(const at::Tensor& x, const at::Tensor& step, const at::Tensor& zero_point, int64_t levels) {
  TORCH_CHECK_VALUE(levels >= 1 && levels <= 65535, "lsq: levels must be between 1 and 65535; got ", levels);
  for (const auto& [name, tensor] : {std::pair{"step", step}, std::pair{"zero_point", zero_point}}) {
    check_dtype("lsq", name, tensor, at::kFloat);
    check_numel("lsq", name, tensor, 1);
    check_same_device("lsq", name, tensor, x);
  }
  return check_scalar("lsq", "x", x.scalar_type());
}

inline Scalar check_lsq_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& step, const at::Tensor& zero_point,
                                 int64_t levels) {
  const char* op = "lsq_backward";
  const Scalar scalar = check_lsq(x, step, zero_point, levels);
  check_dtype(op, "grad", grad, x.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), op, ": grad must be ", x.sizes(), "; got ", grad.sizes());
  check_same_device(op, "grad", grad, x);
  return scalar;
}

}  // namespace quantize::weight
