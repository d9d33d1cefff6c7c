// linear: any rank of input, which is kept packed.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "autocast.h"
#include "energy.h"

namespace quantize::layers {
namespace {

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                        int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
    const PackedArguments packed{codes, ranges, sample_bits, bits, group_size, seed, energy};
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.put(int64_t(bias.has_value())).save();
    variable_list saved = packed_tensors(packed);
    saved.push_back(input.requires_grad() ? weight : Tensor());  // autocast's copy would be kept for nothing
    ctx->save_for_backward(std::move(saved));
    const bool folded = weight.requires_grad() && input.dim() > 2 && !input.is_contiguous();
    at::AutoDispatchBelowADInplaceOrView below;
    return folded ? of_rows(input, weight, bias) : at::linear(input, weight, bias);
  }

  // What at::linear does with gaps between rows where the weight needs a gradient, which below autograd it does not see.
  static Tensor of_rows(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    c10::SymDimVector sizes(input.sym_sizes());
    const Tensor rows = at::linear(input.reshape_symint({-1, sizes.back()}), weight);
    sizes.back() = weight.sym_size(0);
    const Tensor y = rows.view_symint(sizes);
    return bias ? y + *bias : y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("linear");
    const Tensor& grad = grads[0];
    variable_list result(10);
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const bool has_bias = numbers.get_bool();
    const Tensor rows = grad.reshape_symint({-1, grad.sym_size(-1)});
    if (ctx->needs_input_grad(0)) result[0] = grad.matmul(saved[4]);
    if (ctx->needs_input_grad(1)) {
      const Tensor input = kept.unpack(saved.data());
      result[1] = rows.t().mm(input.reshape_symint({-1, input.sym_size(-1)}));
      if (const OptionalTensor energy = saved_energy(ctx)) {
        const bool batched = grad.dim() > 1;
        const double positions = batched ? double(rows.size(0)) / double(grad.size(0)) : 1.;
        const Tensor own = sample_energy(batched ? grad : rows) / positions;
        energy->select(1, 0).copy_(own);
        energy->select(1, 1).copy_(sample_energy(batched ? input : input.unsqueeze(0)) * own);
      }
    }
    if (has_bias && ctx->needs_input_grad(2)) result[2] = rows.sum(0);
    return result;
  }
};

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& codes,
              const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
              const OptionalTensor& energy) {
  return Linear::apply(input, weight, bias, codes, ranges, sample_bits, bits, group_size, seed, energy);
}

template <at::DeviceType device>
Tensor linear_in_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& codes,
                          const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size,
                          const OptionalTensor& seed, const OptionalTensor& energy) {
  const Autocast<device> cast;
  return linear(cast(input), cast(weight), cast(bias), codes, ranges, sample_bits, bits, group_size, seed, energy);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(quantize, AutocastCPU, m) { m.impl("linear", linear_in_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(quantize, AutocastCUDA, m) { m.impl("linear", linear_in_autocast<at::kCUDA>); }

}  // namespace quantize::layers
