// The arguments of channel_quantize's ops, the same for every backend.
#pragma once

#include "../core/checks.h"
#include "codebook.h"

namespace quantize::weight {

// limit: a number a channel, as channel_quantize returns it.
inline Scalar check_clip_gradient(const at::Tensor& grad, const at::Tensor& w, const at::Tensor& limit) {
  const char* op = "clip_gradient";
  const Scalar scalar = check_scalar(op, "w", w.scalar_type());
  check_dtype(op, "grad", grad, w.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == w.sizes(), op, ": grad must be ", w.sizes(), "; got ", grad.sizes());
  check_same_device(op, "grad", grad, w);
  check_dtype(op, "limit", limit, at::kFloat);
  check_numel(op, "limit", limit, ChannelLayout(w).channels);
  check_same_device(op, "limit", limit, w);
  return scalar;
}

}  // namespace quantize::weight
