// conv: convolution of one to three dimensions, transposed or not, that keeps its input packed; conv_of_norm: that has its input from a
// batch norm's (norm_input.h).
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include "autocast.h"
#include "energy.h"
#include "norm_input.h"

namespace quantize::layers {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

struct Conv : torch::autograd::Function<Conv> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                        SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups,
                        const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                        int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy, const NormArguments* norm) {
    const PackedArguments packed{codes, ranges, sample_bits, bits, group_size, seed, energy};
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.put_list(stride).put_list(padding).put_list(dilation).put_list(output_padding).put(groups);
    numbers.put(int64_t(transposed)).put(int64_t(bias.has_value())).save();
    variable_list saved = packed_tensors(packed);
    saved.push_back(weight);
    if (norm) SavedNorm::save(ctx, *norm, saved);
    ctx->save_for_backward(std::move(saved));
    at::AutoDispatchBelowADInplaceOrView below;
    return at::convolution_symint(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("conv");
    const Tensor& grad = grads[0];
    variable_list result(17);
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& weight = saved[4];
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const auto stride = numbers.get_list(), padding = numbers.get_list(), dilation = numbers.get_list(),
               output_padding = numbers.get_list();
    const SymInt groups = numbers.get();
    const bool transposed = numbers.get_bool(), has_bias = numbers.get_bool(), needs_weight = ctx->needs_input_grad(1);
    std::optional<SavedNorm> norm;
    if (saved.size() > 5) norm.emplace(ctx, saved.data() + 5);
    const Tensor input = !needs_weight ? kept.layout.empty(weight.options())
                         : norm        ? norm->unpack(kept, saved.data())
                                       : kept.unpack(saved.data());
    const std::array<bool, 3> mask{ctx->needs_input_grad(0), needs_weight, has_bias && ctx->needs_input_grad(2)};
    std::optional<c10::SymDimVector> bias_sizes;
    if (mask[2]) bias_sizes = c10::SymDimVector{grad.sym_size(grad.dim() - weight.dim() + 1)};
    auto [grad_input, grad_weight, grad_bias] =
        at::convolution_backward_symint(grad, input, weight, bias_sizes ? at::OptionalSymIntArrayRef(*bias_sizes) : std::nullopt, stride,
                                        padding, dilation, transposed, output_padding, groups, mask);
    if (const OptionalTensor energy = saved_energy(ctx); energy && needs_weight) {
      const Tensor own = sample_energy(grad);
      // Each output position meets kernel * channels/groups inputs, out of channels * positions.
      const double kernel = double(weight.numel()) / double(weight.size(0) * weight.size(1));
      const double positions = double(input.numel()) / double(input.size(0) * input.size(1));
      const double share =
          kernel / (transposed ? double(grad.numel()) / double(grad.size(0) * grad.size(1)) : positions) / double(groups.expect_int());
      energy->select(1, 0).copy_(norm && norm->weight ? own * norm->variance_gain() * share : own * share);
      energy->select(1, 1).copy_(sample_energy(input) * own * share);
    }
    result[0] = grad_input, result[1] = grad_weight, result[2] = grad_bias;
    return result;
  }
};

Tensor conv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
            SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups, const OptionalTensor& codes,
            const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
            const OptionalTensor& energy) {
  return Conv::apply(input, weight, bias, stride, padding, dilation, transposed, output_padding, std::move(groups), codes, ranges,
                     sample_bits, bits, group_size, seed, energy, static_cast<const NormArguments*>(nullptr));
}

Tensor conv_of_norm(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                    SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups, const OptionalTensor& codes,
                    const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size,
                    const OptionalTensor& seed, const OptionalTensor& energy, const OptionalTensor& norm_weight,
                    const OptionalTensor& norm_bias, const OptionalTensor& mask, double slope) {
  const NormArguments norm{norm_weight, norm_bias, mask, slope};
  return Conv::apply(input, weight, bias, stride, padding, dilation, transposed, output_padding, std::move(groups), codes, ranges,
                     sample_bits, bits, group_size, seed, energy, static_cast<const NormArguments*>(&norm));
}

template <at::DeviceType device>
Tensor conv_in_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                        SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups,
                        const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                        int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
  const Autocast<device> cast;
  return conv(cast(input), cast(weight), cast(bias), stride, padding, dilation, transposed, output_padding, std::move(groups), codes,
              ranges, sample_bits, bits, group_size, seed, energy);
}

template <at::DeviceType device>
Tensor conv_of_norm_in_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                                SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                                SymInt groups, const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits,
                                int64_t bits, int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy,
                                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& mask,
                                double slope) {
  const Autocast<device> cast;
  return conv_of_norm(cast(input), cast(weight), cast(bias), stride, padding, dilation, transposed, output_padding, std::move(groups),
                      codes, ranges, sample_bits, bits, group_size, seed, energy, norm_weight, norm_bias, mask, slope);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("conv", conv);
  m.impl("conv_of_norm", conv_of_norm);
}
TORCH_LIBRARY_IMPL(quantize, AutocastCPU, m) {
  m.impl("conv", conv_in_autocast<at::kCPU>);
  m.impl("conv_of_norm", conv_of_norm_in_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(quantize, AutocastCUDA, m) {
  m.impl("conv", conv_in_autocast<at::kCUDA>);
  m.impl("conv_of_norm", conv_of_norm_in_autocast<at::kCUDA>);
}

}  // namespace quantize::layers
