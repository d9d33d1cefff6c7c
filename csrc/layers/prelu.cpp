// prelu: a bit an element says where the input was positive, which is all that its own gradient needs. The slope's, the sum of grad * input
// below zero, is linear in the input, which is kept packed for it: its mean is exact.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/prelu.h>
#include <torch/library.h>

#include "channel_shape.h"
#include "energy.h"

namespace quantize::layers {
namespace {

struct PRelu : torch::autograd::Function<PRelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const PackedArguments& packed) {
    static const auto pack_mask = find_op<Tensor(const Tensor&)>("quantize::pack_mask");
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.save();
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved = packed_tensors(packed);
    saved.insert(saved.end(), {pack_mask.call(input > 0), weight});
    ctx->save_for_backward(std::move(saved));
    return at::prelu(input, weight);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("prelu");
    variable_list result(3);
    if (!grads[0].defined()) return result;
    static const auto apply_mask = find_op<Tensor(const Tensor&, const Tensor&, double, double)>("quantize::apply_mask");
    const variable_list saved = ctx->get_saved_variables();
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const Tensor grad = kept.layout.ordered(grads[0].to(kept.dtype)), &mask = saved[4], &weight = saved[5];
    const Tensor slope = weight.sym_numel() == 1 ? weight.reshape({}) : weight.view(channel_shape(grad));
    const Tensor below = apply_mask.call(grad, mask, 0., 1.);
    if (ctx->needs_input_grad(0)) result[0] = apply_mask.call(grad, mask, 1., 0.).add_(below * slope);
    if (ctx->needs_input_grad(1)) {
      const Tensor products = below * kept.unpack(saved.data());
      result[1] = (slope.dim() ? at::sum_to(products, slope.sym_sizes()) : products.sum()).view_symint(weight.sym_sizes());
      if (const OptionalTensor energy = saved_energy(ctx)) {
        energy->select(1, 0).copy_(sample_energy(below) / (double(grad.numel()) / double(grad.size(0))));
        energy->select(1, 1).zero_();
      }
    }
    return result;
  }
};

Tensor prelu(const Tensor& input, const Tensor& weight, const OptionalTensor& codes, const OptionalTensor& ranges,
             const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
             const OptionalTensor& energy) {
  return PRelu::apply(input, weight, PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("prelu", prelu); }

}  // namespace quantize::layers
