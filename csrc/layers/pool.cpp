// max_pool: keeps 8-bit offsets within the windows. avg_pool, adaptive_avg_pool: keep nothing but the input's shape.
#include <ATen/ops/_adaptive_avg_pool2d.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/_adaptive_avg_pool3d.h>
#include <ATen/ops/_adaptive_avg_pool3d_backward.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/avg_pool3d.h>
#include <ATen/ops/avg_pool3d_backward.h>
#include <torch/library.h>

#include "saved_activation.h"

namespace quantize::layers {
namespace {

using at::IntArrayRef;

struct MaxPool : torch::autograd::Function<MaxPool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                               IntArrayRef dilation, bool ceil_mode, bool with_indices) {
    static const auto op = find_op<std::tuple<Tensor, Tensor>(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>(
        "quantize::max_pool_offsets");
    static const auto unpack =
        find_op<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef)>("quantize::unpack_pool_indices");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, offsets] = op.call(input, kernel, stride, padding, dilation, ceil_mode);
    NumberWriter numbers(ctx);
    save_layout(numbers, input);
    numbers.put_list(kernel).put_list(stride).put_list(padding).put_list(dilation).put(int64_t(ceil_mode)).save();
    ctx->save_for_backward({offsets});
    if (!with_indices) return {output};
    const Tensor indices = unpack.call(offsets, input.sizes().slice(input.dim() - kernel.size()), kernel, stride, padding, dilation);
    ctx->mark_non_differentiable({indices});
    return {output, indices};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef, IntArrayRef, IntArrayRef,
                                          IntArrayRef, IntArrayRef, bool)>("quantize::max_pool_backward");
    refuse_double_backward("max_pool");
    variable_list result(7);
    if (!grads[0].defined()) return result;
    NumberReader numbers(ctx);
    const SavedLayout layout(numbers);
    const auto kernel = numbers.get_ints(), stride = numbers.get_ints(), padding = numbers.get_ints(), dilation = numbers.get_ints();
    const bool ceil_mode = numbers.get_bool();
    result[0] = op.call(grads[0], ctx->get_saved_variables()[0], layout.size, layout.stride, kernel, stride, padding, dilation, ceil_mode);
    return result;
  }
};

struct AvgPool : torch::autograd::Function<AvgPool> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                        bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor) {
    at::AutoDispatchBelowADInplaceOrView below;
    NumberWriter numbers(ctx);
    save_layout(numbers, input);
    numbers.put_list(kernel).put_list(stride).put_list(padding).put(int64_t(ceil_mode)).put(int64_t(count_include_pad)).save();
    ctx->saved_data["divisor"] = divisor;
    return kernel.size() == 2 ? at::avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
                              : at::avg_pool3d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("avg_pool");
    variable_list result(7);
    if (!grads[0].defined()) return result;
    NumberReader numbers(ctx);
    const Tensor shape = SavedLayout(numbers).empty(grads[0].options());
    const auto kernel = numbers.get_ints(), stride = numbers.get_ints(), padding = numbers.get_ints();
    const bool ceil_mode = numbers.get_bool(), include = numbers.get_bool();
    const auto divisor = ctx->saved_data["divisor"].toOptional<int64_t>();
    result[0] = kernel.size() == 2 ? at::avg_pool2d_backward(grads[0], shape, kernel, stride, padding, ceil_mode, include, divisor)
                                   : at::avg_pool3d_backward(grads[0], shape, kernel, stride, padding, ceil_mode, include, divisor);
    return result;
  }
};

struct AdaptiveAvgPool : torch::autograd::Function<AdaptiveAvgPool> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, c10::SymIntArrayRef output_size) {
    at::AutoDispatchBelowADInplaceOrView below;
    NumberWriter numbers(ctx);
    save_layout(numbers, input);
    numbers.put(int64_t(output_size.size())).save();
    return output_size.size() == 2 ? at::_adaptive_avg_pool2d_symint(input, output_size)
                                   : at::_adaptive_avg_pool3d_symint(input, output_size);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("adaptive_avg_pool");
    variable_list result(2);
    if (!grads[0].defined()) return result;
    NumberReader numbers(ctx);
    const Tensor shape = SavedLayout(numbers).empty(grads[0].options());
    result[0] =
        numbers.get_int() == 2 ? at::_adaptive_avg_pool2d_backward(grads[0], shape) : at::_adaptive_avg_pool3d_backward(grads[0], shape);
    return result;
  }
};

Tensor max_pool(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  return MaxPool::apply(input, kernel, stride, padding, dilation, ceil_mode, false)[0];
}

std::tuple<Tensor, Tensor> max_pool_with_indices(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                                 IntArrayRef dilation, bool ceil_mode) {
  const variable_list outputs = MaxPool::apply(input, kernel, stride, padding, dilation, ceil_mode, true);
  return {outputs[0], outputs[1]};
}

Tensor avg_pool(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor) {
  return AvgPool::apply(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor);
}

Tensor adaptive_avg_pool(const Tensor& input, c10::SymIntArrayRef output_size) { return AdaptiveAvgPool::apply(input, output_size); }

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_with_indices", max_pool_with_indices);
  m.impl("avg_pool", avg_pool);
  m.impl("adaptive_avg_pool", adaptive_avg_pool);
}

}  // namespace quantize::layers
