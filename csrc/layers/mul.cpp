// mul: input * gate, as in squeeze-and-excitation and layer scales. The gate, broadcast over the input, is kept as it is; the input,
// which only the gate's gradient needs, is packed. That gradient, sum(grad * input), is linear in it: its mean is exact.
#include <ATen/ExpandUtils.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include "energy.h"

namespace quantize::layers {
namespace {

template <bool in_place>
struct Mul : torch::autograd::Function<Mul<in_place>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& gate, const PackedArguments& packed) {
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.save();
    variable_list saved = packed_tensors(packed);
    saved.push_back(gate);
    ctx->save_for_backward(std::move(saved));
    at::AutoDispatchBelowADInplaceOrView below;
    if constexpr (in_place) {
      Tensor x = input;
      x.mul_(gate);
      ctx->mark_dirty({x});
      return x;
    } else {
      return at::mul(input, gate);
    }
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("mul");
    const Tensor& grad = grads[0];
    variable_list result(3);
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& gate = saved[4];
    if (ctx->needs_input_grad(0)) result[0] = grad * gate;
    if (ctx->needs_input_grad(1)) {
      NumberReader numbers(ctx);
      result[1] = at::sum_to(grad * SavedActivation(numbers).unpack(saved.data()), gate.sym_sizes());
      if (const OptionalTensor energy = saved_energy(ctx)) {
        const double elements = double(grad.numel()) / double(grad.size(0));
        energy->select(1, 0).copy_(sample_energy(grad) / elements);  // as if the gate were a parameter
        energy->select(1, 1).zero_();
      }
    }
    return result;
  }
};

Tensor mul(const Tensor& input, const Tensor& gate, const OptionalTensor& codes, const OptionalTensor& ranges,
           const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
  return Mul<false>::apply(input, gate, PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
}

Tensor& mul_(Tensor& input, const Tensor& gate, const OptionalTensor& codes, const OptionalTensor& ranges,
             const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
             const OptionalTensor& energy) {
  input = Mul<true>::apply(input, gate, PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
  return input;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("mul", mul);
  m.impl("mul_", mul_);
}

}  // namespace quantize::layers
