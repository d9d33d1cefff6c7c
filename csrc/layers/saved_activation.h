// A packed activation on its way from a layer's forward to its backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../activation/group_layout.h"
#include "../activation/saved_layout.h"
#include "../core/autograd.h"
#include "../core/dispatch.h"

namespace quantize::layers {

using activation::save_layout;
using activation::SavedLayout;
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
inline void save_packed(AutogradContext* ctx, NumberWriter& numbers, const Tensor& input, const PackedArguments& packed) {
  save_layout(numbers, input);
  numbers.put(int64_t(input.scalar_type())).put(packed.bits).put(packed.group_size);
  if (packed.energy) ctx->saved_data["energy"] = *packed.energy;
}

inline variable_list packed_tensors(const PackedArguments& packed) {
  return {packed.codes.value_or(Tensor()), packed.ranges.value_or(Tensor()), packed.sample_bits.value_or(Tensor()),
          packed.seed.value_or(Tensor())};
}

inline const auto& group_dequantize() {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, c10::SymIntArrayRef,
                                        c10::SymIntArrayRef, at::ScalarType, const Tensor&)>("quantize::group_dequantize");
  return op;
}

// What save_packed put.
struct SavedActivation {
  SavedLayout layout;
  at::ScalarType dtype;
  int64_t bits, group_size;

  explicit SavedActivation(NumberReader& numbers)
      : layout(numbers), dtype(at::ScalarType(numbers.get_int())), bits(numbers.get_int()), group_size(numbers.get_int()) {}

  // The activation from the four saved tensors that packed_tensors made.
  Tensor unpack(const Tensor* saved) const {
    const OptionalTensor sample_bits = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    return group_dequantize().call(saved[0], saved[1], sample_bits, bits, group_size, layout.size, layout.stride, dtype, saved[3]);
  }
};

inline void refuse_double_backward(const char* op) {
  quantize::refuse_double_backward(op, "the backward of a layer with compressed activations",
                                   "; disable compression (ActivationConfig(enabled=False)) for second derivatives");
}

}  // namespace quantize::layers
