// The arguments of dorefa's ops, the same for every backend.
#pragma once

#include "../activation/group_layout.h"
#include "dorefa.h"

namespace quantize::weight {

inline Scalar check_dorefa(const at::Tensor& w, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 16, "dorefa: bits must be between 1 and 16; got ", bits);
  return check_scalar("dorefa", "w", w.scalar_type());
}

inline Scalar check_dorefa_backward(const at::Tensor& grad, const at::Tensor& w, const at::Tensor& stats) {
  const char* op = "dorefa_backward";
  check_dtype(op, "grad", grad, w.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == w.sizes(), op, ": grad must be ", w.sizes(), "; got ", grad.sizes());
  check_same_device(op, "grad", grad, w);
  check_dtype(op, "stats", stats, at::kFloat);
  check_numel(op, "stats", stats, 3);
  check_same_device(op, "stats", stats, w);
  return check_scalar(op, "w", w.scalar_type());
}

inline Scalar check_gradient(const at::Tensor& grad, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 16, "dorefa_gradient: bits must be between 2 and 16; got ", bits);
  return check_scalar("dorefa_gradient", "grad", grad.scalar_type());
}

// Of one sample: along dimension 0.
inline int64_t sample_elements(const at::Tensor& x) { return x.numel() / (x.dim() ? std::max<int64_t>(x.size(0), 1) : 1); }

}  // namespace quantize::weight
