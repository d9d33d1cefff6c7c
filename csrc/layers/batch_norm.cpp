// batch_norm_forward: statistics and output, from the full-precision input. batch_norm: what autograd knows of them, for which the
// normalized input x^ is kept packed. Packed itself, channels that differ in size would share groups, and noise of the large ones' size,
// divided by the small ones' deviation, would be all that is left of their gradient.
#include <ATen/ops/native_batch_norm.h>
#include <torch/library.h>

#include "channel_shape.h"
#include "energy.h"

namespace quantize::layers {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                                      const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                                      double momentum, double eps) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "batch_norm: input must be [N, C, ...]; got ", input.sym_sizes());
  const std::pair<const char*, const OptionalTensor&> per_channel[] = {
      {"weight", weight}, {"bias", bias}, {"running_mean", running_mean}, {"running_var", running_var}};
  for (const auto& [name, t] : per_channel)
    TORCH_CHECK_VALUE(!t || t->sym_numel() == input.sym_size(1), "batch_norm: ", name, " must have ", input.sym_size(1), " elements; got ",
                      t->sym_sizes());
  TORCH_CHECK_VALUE(training || (running_mean && running_var), "batch_norm: running_mean and running_var must be given in evaluation");
  at::AutoDispatchBelowADInplaceOrView below;
  auto [output, mean, inverse_std] = at::native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps);
  const auto as_float = [](const Tensor& t) { return t.scalar_type() == at::kFloat ? t : t.to(at::kFloat); };
  if (training) return {output, as_float(mean), as_float(inverse_std)};
  return {output, running_mean->to(at::kFloat, /*non_blocking=*/false, /*copy=*/true),
          running_var->to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).add_(eps).rsqrt_()};
}

// What the norm made of its input.
struct Made {
  const Tensor &output, &inverse_std;
  bool training;
};

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Made& made, const PackedArguments& packed) {
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.put(int64_t(made.training)).put(int64_t(bias.has_value())).save();
    variable_list saved = packed_tensors(packed);
    saved.insert(saved.end(), {weight.value_or(Tensor()), made.inverse_std});
    ctx->save_for_backward(std::move(saved));
    at::AutoDispatchBelowADInplaceOrView below;
    return made.output.detach();  // the same memory, which nobody else has
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("batch_norm");
    variable_list result(5);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const OptionalTensor weight = optional(4);
    const Tensor& inverse_std = saved[5];
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const bool training = numbers.get_bool(), has_bias = numbers.get_bool();
    // Arguments that are None have no number.
    const std::array<bool, 3> mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1),
                                   has_bias && ctx->needs_input_grad(weight ? 2 : 1)};
    if (!saved[0].defined()) {  // fixed statistics and a frozen weight: the layer is linear, and its input was not kept
      const Tensor gain = weight ? inverse_std * *weight : inverse_std;
      if (mask[0]) result[0] = grad * gain.to(grad.scalar_type()).view(channel_shape(grad));
      if (mask[2]) {
        std::vector<int64_t> rest{0};
        for (int64_t d = 2; d < grad.dim(); ++d) rest.push_back(d);
        result[2] = grad.sum(rest, false, at::kFloat);
      }
      return result;
    }
    static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, c10::SymIntArrayRef, c10::SymIntArrayRef,
        const Tensor&, const OptionalTensor&, const Tensor&, bool, std::array<bool, 3>, bool)>("quantize::batch_norm_backward");
    const OptionalTensor energy = saved_energy(ctx);
    const bool reports = energy && training && mask[0];
    Tensor figures;
    std::tie(result[0], result[1], result[2], figures) =
        op.call(grad.to(kept.dtype), saved[0], saved[1], optional(2), kept.bits, kept.group_size, kept.layout.size, kept.layout.stride,
                saved[3], weight, inverse_std, training, mask, reports);
    if (reports) energy->copy_(figures);
    return result;
  }
};

Tensor batch_norm(const Tensor& input, const Tensor& output, const OptionalTensor& weight, const OptionalTensor& bias,
                  const Tensor& inverse_std, bool training, const OptionalTensor& codes, const OptionalTensor& ranges,
                  const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
                  const OptionalTensor& energy) {
  return BatchNorm::apply(input, weight, bias, Made{output, inverse_std, training},
                          PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_forward", batch_norm_forward);
  m.impl("batch_norm", batch_norm);
}

}  // namespace quantize::layers
