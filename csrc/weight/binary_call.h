// The arguments of binary's ops, the same for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/checks.h"
#include "binary.h"

namespace quantize::weight {

// Dimension 0 are the filters, dimension 1 their input channels; a vector is one filter of nothing to centre.
struct BinaryCall {
  int64_t rows;
  BinaryShape shape;  // of a row

  explicit BinaryCall(const at::Tensor& w) {
    rows = w.dim() > 1 ? w.size(0) : 1;
    shape = {rows ? w.numel() / rows : 0, 1, false};
    if (w.dim() < 2 || w.size(1) < 2) return;
    shape = {w.size(1), 1, true};
    for (int64_t d = 2; d < w.dim(); ++d) shape.taps *= w.size(d);
  }
};

inline Scalar check_binary(const at::Tensor& w, double share) {
  TORCH_CHECK_VALUE(share > 0, "binary: share must be above 0; got ", share);
  return check_scalar("binary", "w", w.scalar_type());
}

inline void check_binary_backward(const at::Tensor& grad, const at::Tensor& w, const at::Tensor& scale, const at::Tensor& mean,
                                  const at::Tensor& limit) {
  const char* op = "binary_backward";
  const BinaryCall call(w);
  check_dtype(op, "grad", grad, w.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == w.sizes(), op, ": grad must be ", w.sizes(), "; got ", grad.sizes());
  check_same_device(op, "grad", grad, w);
  for (const auto& [name, tensor, numel] :
       {std::tuple{"scale", scale, call.rows}, {"mean", mean, call.rows * call.shape.taps}, {"limit", limit, int64_t(1)}}) {
    check_dtype(op, name, tensor, at::kFloat);
    check_numel(op, name, tensor, numel);
    check_same_device(op, name, tensor, w);
  }
}

}  // namespace quantize::weight
