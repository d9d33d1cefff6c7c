// The arguments of the mask ops, the same for every backend.
#pragma once

#include <ATen/ops/empty.h>

#include "group_layout.h"
#include "sign_mask_kernels.h"

namespace quantize::activation {

inline void check_clip_in_place(const at::Tensor& x) {
  TORCH_CHECK_VALUE(packed_strides(x.sizes(), x.strides()) == x.strides().vec(),
                    "clip_mask_: x must be dense in memory with its first dimension outermost; got sizes ", x.sizes(), ", strides ",
                    x.strides());
}

inline Scalar check_apply_mask(const at::Tensor& grad, const at::Tensor& mask) {
  const char* op = "apply_mask";
  check_dtype(op, "mask", mask, at::kByte);
  check_numel(op, "mask", mask, mask_bytes(grad.numel()));
  check_same_device(op, "mask", mask, grad);
  return check_scalar(op, "grad", grad.scalar_type());
}

inline at::Tensor empty_mask(const at::Tensor& x) { return at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte)); }

}  // namespace quantize::activation
