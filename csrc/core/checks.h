// Checks that name the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "half.h"

namespace quantize {

inline void check_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits == 1 || bits == 2 || bits == 4 || bits == 8, op, ": bits must be 1, 2, 4 or 8; got ", bits);
}

// The element type as the kernels know it; a TypeError for anything but fp32, fp16 and bf16.
inline Scalar check_scalar(const char* op, const char* argument, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Scalar::f32;
    case at::kHalf:
      return Scalar::f16;
    case at::kBFloat16:
      return Scalar::bf16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", argument, " must be float32, float16 or bfloat16; got ", dtype);
  }
}

inline void check_dtype(const char* op, const char* argument, const at::Tensor& tensor, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": ", argument, " must be ", expected, "; got ", tensor.scalar_type());
}

inline void check_numel(const char* op, const char* argument, const at::Tensor& tensor, int64_t expected) {
  TORCH_CHECK_VALUE(tensor.numel() == expected, op, ": ", argument, " must have ", expected, " elements; got ", tensor.sizes());
}

inline void check_contiguous(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", argument, " must be contiguous; got strides ", tensor.strides(), " of ",
                    tensor.sizes());
}

inline void check_same_device(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", argument, " must be on ", x.device(), "; got ", tensor.device());
}

}  // namespace quantize
