// The input of a convolution as a batch norm's packed input, which a ReLU's mask may follow: nothing is kept of its own.
//
// With x packed, unbiased, x^ = (x - mean) * inverse_std and an exact mask m (of a leaky ReLU: its slope where the mask has none), the
// input m * (weight * x^ + bias) comes back unbiased too, with weight^2 * inverse_std^2 times the variance of x.
#pragma once

#include "saved_activation.h"

namespace quantize::layers {

// The statistics are float32 [channels]; weight and bias as the norm has them.
struct NormArguments {
  const Tensor &mean, &inverse_std;
  const OptionalTensor &weight, &bias, &mask;
  double slope;
};

inline Tensor norm_gain(const Tensor& inverse_std, const OptionalTensor& weight) {
  return weight ? inverse_std.mul(weight->to(at::kFloat)) : inverse_std;
}

struct SavedNorm {
  static constexpr size_t tensors = 5;

  static void save(AutogradContext* ctx, const NormArguments& norm, variable_list& saved) {
    ctx->saved_data["slope"] = norm.slope;
    for (const OptionalTensor& t : {OptionalTensor(norm.mean), OptionalTensor(norm.inverse_std), norm.weight, norm.bias, norm.mask})
      saved.push_back(t.value_or(Tensor()));
  }

  const Tensor &mean, &inverse_std;
  OptionalTensor weight, bias, mask;
  double slope;

  // saved: those that save() appended.
  SavedNorm(AutogradContext* ctx, const Tensor* saved)
      : mean(saved[0]),
        inverse_std(saved[1]),
        weight(given(saved[2])),
        bias(given(saved[3])),
        mask(given(saved[4])),
        slope(ctx->saved_data["slope"].toDouble()) {}

  // As SavedActivation::unpack, of the norm's packed input.
  Tensor unpack(const SavedActivation& kept, const Tensor* packed) const {
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, c10::SymIntArrayRef, c10::SymIntArrayRef,
                       at::ScalarType, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                       const OptionalTensor&, double)>("quantize::norm_dequantize");
    return op.call(packed[0], packed[1], given(packed[2]), kept.bits, kept.group_size, kept.layout.size, kept.layout.stride, kept.dtype,
                   packed[3], mean, inverse_std, weight, bias, mask, slope);
  }

  // What a variance of x becomes, the mask aside.
  Tensor variance_gain() const { return norm_gain(inverse_std, weight).square().mean(); }

 private:
  static OptionalTensor given(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
};

}  // namespace quantize::layers
