// A packed activation on its way from a layer's forward to its backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../activation/group_layout.h"
#include "../activation/saved_layout.h"
#include "../core/autograd.h"
#include "../core/dispatch.h"

namespace quantize::layers {

using activation::save_layout;
using activation::saved_sizes;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// The arguments that every op with a packed input ends with.
struct PackedArguments {
  const OptionalTensor &codes, &ranges, &sample_bits;
  int64_t bits, group_size;
  const OptionalTensor &seed, &energy;
};

// Shape and dtype of the activation, kept beside the bytes. Everything that holds storage goes through save_for_backward, so that saved
// tensor hooks (and with them reports and checkpointing) see it; energy is an output and does not.
inline void save_packed(AutogradContext* ctx, const Tensor& input, const PackedArguments& packed) {
  save_layout(ctx, input);
  ctx->saved_data["dtype"] = static_cast<int64_t>(input.scalar_type());
  ctx->saved_data["bits"] = packed.bits;
  ctx->saved_data["group_size"] = packed.group_size;
  ctx->saved_data["energy"] = packed.energy;
}

inline variable_list packed_tensors(const PackedArguments& packed) {
  return {packed.codes.value_or(Tensor()), packed.ranges.value_or(Tensor()), packed.sample_bits.value_or(Tensor()),
          packed.seed.value_or(Tensor())};
}

inline at::ScalarType saved_dtype(AutogradContext* ctx) { return static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()); }

inline const auto& group_dequantize() {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, c10::SymIntArrayRef,
                                        c10::SymIntArrayRef, at::ScalarType, const Tensor&)>("quantize::group_dequantize");
  return op;
}

// The activation from four saved tensors that packed_tensors made.
inline Tensor unpack_saved(AutogradContext* ctx, const Tensor* saved) {
  const OptionalTensor sample_bits = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
  return group_dequantize().call(saved[0], saved[1], sample_bits, ctx->saved_data["bits"].toInt(), ctx->saved_data["group_size"].toInt(),
                                 saved_sizes(ctx, "size"), saved_sizes(ctx, "stride"), saved_dtype(ctx), saved[3]);
}

// For backward formulas of ATen that read no more of their input than its shape: memory that is never touched.
inline Tensor shape_of_saved(AutogradContext* ctx, const Tensor& like) {
  return at::empty_strided_symint(saved_sizes(ctx, "size"), saved_sizes(ctx, "stride"), like.options());
}

inline void refuse_double_backward(const char* op) {
  quantize::refuse_double_backward(op, "the backward of a layer with compressed activations",
                                   "; disable compression (ActivationConfig(enabled=False)) for second derivatives");
}

}  // namespace quantize::layers
