// A tensor's sizes and memory order, kept beside what a backward needs of it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>

#include "packed_strides.h"

namespace quantize::activation {

inline void save_layout(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
  ctx->saved_data["size"] = x.sym_sizes().vec();
  ctx->saved_data["stride"] = packed_strides(x.sym_sizes(), x.sym_strides());
}

inline c10::SymDimVector saved_sizes(torch::autograd::AutogradContext* ctx, const char* name) {
  c10::SymDimVector sizes;
  for (const at::IValue& v : ctx->saved_data[name].toListRef()) sizes.push_back(v.toSymInt());
  return sizes;
}

// What was kept element by element is in the forward's memory order, and so must the gradient be.
inline at::Tensor in_saved_layout(torch::autograd::AutogradContext* ctx, const at::Tensor& grad) {
  const auto strides = saved_sizes(ctx, "stride");
  if (grad.sym_strides() == c10::SymIntArrayRef(strides)) return grad;
  return at::empty_strided_symint(saved_sizes(ctx, "size"), strides, grad.options()).copy_(grad);
}

}  // namespace quantize::activation
