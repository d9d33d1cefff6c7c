// The input of a convolution as a batch norm's packed input, which a ReLU's mask may follow: nothing is kept of its own.
//
// With the normalized input x^ packed, unbiased, and an exact mask m (of a leaky ReLU: its slope where the mask has none), the input
// m * (weight * x^ + bias) comes back unbiased too, with weight^2 times the variance of x^.
#pragma once

#include "saved_activation.h"

namespace quantize::layers {

// weight and bias as the norm has them, [channels].
struct NormArguments {
  const OptionalTensor &weight, &bias, &mask;
  double slope;
};

struct SavedNorm {
  static void save(AutogradContext* ctx, const NormArguments& norm, variable_list& saved) {
    ctx->saved_data["slope"] = norm.slope;
    for (const OptionalTensor& t : {norm.weight, norm.bias, norm.mask}) saved.push_back(t.value_or(Tensor()));
  }

  OptionalTensor weight, bias, mask;
  double slope;

  // saved: those that save() appended.
  SavedNorm(AutogradContext* ctx, const Tensor* saved)
      : weight(given(saved[0])), bias(given(saved[1])), mask(given(saved[2])), slope(ctx->saved_data["slope"].toDouble()) {}

  // As SavedActivation::unpack, of the norm's packed input.
  Tensor unpack(const SavedActivation& kept, const Tensor* packed) const {
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, c10::SymIntArrayRef, c10::SymIntArrayRef,
                       at::ScalarType, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double)>(
            "quantize::norm_dequantize");
    return op.call(packed[0], packed[1], given(packed[2]), kept.bits, kept.group_size, kept.layout.size, kept.layout.stride, kept.dtype,
                   packed[3], weight, bias, mask, slope);
  }

  // By what a norm with a weight multiplies the variance of x^, the mask aside.
  Tensor variance_gain() const { return weight->to(at::kFloat).square().mean(); }

 private:
  static OptionalTensor given(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
};

}  // namespace quantize::layers
