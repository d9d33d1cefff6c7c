// clip: the ReLU family and hardtanh, on an exact mask of one bit an element. dropout: the same mask, drawn.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_dropout.h>
#include <torch/library.h>

#include "saved_activation.h"

namespace quantize::layers {
namespace {

Tensor apply_mask(AutogradContext* ctx, const Tensor& grad, const Tensor& mask, double on, double off) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, double, double)>("quantize::apply_mask");
  NumberReader numbers(ctx);
  return op.call(SavedLayout(numbers).ordered(grad), mask, on, off);
}

void save_mask(AutogradContext* ctx, const Tensor& x, const Tensor& mask) {
  NumberWriter numbers(ctx);
  save_layout(numbers, x);
  numbers.save();
  ctx->save_for_backward({mask});
}

// with_mask: the mask goes out with the output.
template <bool in_place, bool with_mask>
struct Clip : torch::autograd::Function<Clip<in_place, with_mask>> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, double low, double high, double negative_slope) {
    ctx->saved_data["slope"] = negative_slope;
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y = input, mask;
    if constexpr (in_place) {
      static const auto op = find_op<Tensor(Tensor&, double, double, double)>("quantize::clip_mask_");
      mask = op.call(y, low, high, negative_slope);
      ctx->mark_dirty({y});
    } else {
      static const auto op = find_op<std::tuple<Tensor, Tensor>(const Tensor&, double, double, double)>("quantize::clip_mask");
      std::tie(y, mask) = op.call(input, low, high, negative_slope);
    }
    save_mask(ctx, input, mask);
    if constexpr (!with_mask) return {y};
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({mask});
    return {y, mask};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("relu or hardtanh");
    variable_list result(4);
    if (grads[0].defined()) result[0] = apply_mask(ctx, grads[0], ctx->get_saved_variables()[0], 1., ctx->saved_data["slope"].toDouble());
    return result;
  }
};

Tensor pack_mask(const Tensor& mask) {
  static const auto op = find_op<Tensor(const Tensor&)>("quantize::pack_mask");
  return op.call(mask);
}

// 1 / (1 - p) as at::dropout's noise holds it: rounded to the tensor's type.
double rounded_scale(double p, at::ScalarType dtype) {
  if (p == 1.) return 0.;
  const float scale = 1.f / static_cast<float>(1. - p);
  if (dtype == at::kBFloat16) return static_cast<float>(static_cast<at::BFloat16>(scale));
  return dtype == at::kHalf ? static_cast<float>(static_cast<at::Half>(scale)) : scale;
}

struct Dropout : torch::autograd::Function<Dropout> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, double p) {
    at::AutoDispatchBelowADInplaceOrView below;
    // To the bit what at::dropout computes: one fused kernel on GPUs, else a product with noise of 0 and 1 / (1 - p).
    if (input.is_cuda() && p < 1.) {
      auto [output, mask] = at::native_dropout(input, p, true);
      save_mask(ctx, mask, pack_mask(mask));
      ctx->saved_data["scale"] = 1. / (1. - p);
      return output;
    }
    Tensor noise = at::empty_like(input);
    p < 1. ? noise.bernoulli_(1. - p).div_(1. - p) : noise.zero_();
    save_mask(ctx, noise, pack_mask(noise.to(at::kBool)));
    ctx->saved_data["scale"] = rounded_scale(p, input.scalar_type());
    return input.mul(noise);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("dropout");
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    return {apply_mask(ctx, grads[0], ctx->get_saved_variables()[0], ctx->saved_data["scale"].toDouble(), 0.), Tensor()};
  }
};

Tensor clip(const Tensor& input, double low, double high, double negative_slope) {
  return Clip<false, false>::apply(input, low, high, negative_slope)[0];
}

Tensor& clip_(Tensor& input, double low, double high, double negative_slope) {
  input = Clip<true, false>::apply(input, low, high, negative_slope)[0];
  return input;
}

std::tuple<Tensor, Tensor> clip_and_mask(const Tensor& input, double low, double high, double negative_slope) {
  const variable_list made = Clip<false, true>::apply(input, low, high, negative_slope);
  return {made[0], made[1]};
}

Tensor clip_and_mask_(Tensor& input, double low, double high, double negative_slope) {
  const variable_list made = Clip<true, true>::apply(input, low, high, negative_slope);
  input = made[0];
  return made[1];
}

Tensor dropout(const Tensor& input, double p) {
  TORCH_CHECK_VALUE(p >= 0. && p <= 1., "dropout: p must be between 0 and 1; got ", p);
  return Dropout::apply(input, p);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("clip", clip);
  m.impl("clip_", clip_);
  m.impl("clip_and_mask", clip_and_mask);
  m.impl("clip_and_mask_", clip_and_mask_);
  m.impl("dropout", dropout);
}

}  // namespace quantize::layers
