// The arguments of fixed_grid's ops, the same for every backend.
#pragma once

#include "../activation/group_layout.h"
#include "fixed_grid.h"

namespace quantize::weight {

inline Scalar check_unit(const at::Tensor& x, int64_t levels) {
  TORCH_CHECK_VALUE(levels >= 1 && levels <= 65535, "unit_quantize: levels must be between 1 and 65535; got ", levels);
  return check_scalar("unit_quantize", "x", x.scalar_type());
}

inline Scalar check_grid_backward(const at::Tensor& grad, const at::Tensor& kept, bool polynomial) {
  check_dtype("grid_backward", "kept", kept, at::kByte);
  check_numel("grid_backward", "kept", kept, slope_bytes(grad.numel(), polynomial));
  check_same_device("grid_backward", "kept", kept, grad);
  return check_scalar("grid_backward", "grad", grad.scalar_type());
}

}  // namespace quantize::weight
