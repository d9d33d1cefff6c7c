// batch_norm: statistics and output from the full-precision input, which is kept packed for the backward. batch_norm_and_statistics: also
// gives what it normalized with.
#include <ATen/ops/native_batch_norm.h>
#include <torch/library.h>

#include "channel_shape.h"
#include "energy.h"

namespace quantize::layers {
namespace {

// statistics: whether mean and inverse deviation go out with the output.
template <bool statistics>
struct BatchNorm : torch::autograd::Function<BatchNorm<statistics>> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
                               double eps, const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits,
                               int64_t bits, int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
    const PackedArguments packed{codes, ranges, sample_bits, bits, group_size, seed, energy};
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.put(int64_t(training)).put(int64_t(bias.has_value())).save();
    ctx->saved_data["eps"] = eps;
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, inverse_std] = at::native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps);
    variable_list saved = packed_tensors(packed);
    for (const OptionalTensor& t : {weight, training ? std::nullopt : running_mean, training ? std::nullopt : running_var})
      saved.push_back(t.value_or(Tensor()));
    saved.insert(saved.end(), {mean, inverse_std});
    ctx->save_for_backward(std::move(saved));
    if constexpr (!statistics) return {output};
    ctx->set_materialize_grads(false);
    if (!training) mean = running_mean->clone(), inverse_std = running_var->add(eps).rsqrt_();
    ctx->mark_non_differentiable({mean, inverse_std});
    return {output, mean, inverse_std};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("batch_norm");
    variable_list result(15);
    Tensor grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const OptionalTensor weight = optional(4), running_mean = optional(5), running_var = optional(6);
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const bool training = numbers.get_bool(), has_bias = numbers.get_bool();
    const double eps = ctx->saved_data["eps"].toDouble();
    // Arguments that are None have no number.
    const std::array<bool, 3> mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1),
                                   has_bias && ctx->needs_input_grad(weight ? 2 : 1)};
    if (!saved[0].defined()) {  // fixed statistics and a frozen weight: the layer is linear, and its input was not kept
      if (mask[0]) {
        Tensor gain = (*running_var + eps).rsqrt();
        if (weight) gain = gain * *weight;
        result[0] = grad * gain.to(grad.scalar_type()).view(channel_shape(grad));
      }
      if (mask[2]) {
        std::vector<int64_t> rest{0};
        for (int64_t d = 2; d < grad.dim(); ++d) rest.push_back(d);
        result[2] = grad.sum(rest, false, running_var->scalar_type());
      }
      return result;
    }
    static const auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, c10::SymIntArrayRef, c10::SymIntArrayRef,
        const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, double,
        std::array<bool, 3>, bool)>("quantize::batch_norm_backward");
    const OptionalTensor energy = saved_energy(ctx);
    const bool reports = energy && training && mask[0];
    Tensor figures;
    std::tie(result[0], result[1], result[2], figures) =
        op.call(grad.to(kept.dtype), saved[0], saved[1], optional(2), kept.bits, kept.group_size, kept.layout.size, kept.layout.stride,
                saved[3], weight, running_mean, running_var, saved[7], saved[8], training, eps, mask, reports);
    if (reports) energy->copy_(figures);
    return result;
  }
};

template <bool statistics>
variable_list run(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
                  const OptionalTensor& running_var, bool training, double momentum, double eps, const OptionalTensor& codes,
                  const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size,
                  const OptionalTensor& seed, const OptionalTensor& energy) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "batch_norm: input must be [N, C, ...]; got ", input.sym_sizes());
  const std::pair<const char*, const OptionalTensor&> per_channel[] = {
      {"weight", weight}, {"bias", bias}, {"running_mean", running_mean}, {"running_var", running_var}};
  for (const auto& [name, t] : per_channel)
    TORCH_CHECK_VALUE(!t || t->sym_numel() == input.sym_size(1), "batch_norm: ", name, " must have ", input.sym_size(1), " elements; got ",
                      t->sym_sizes());
  TORCH_CHECK_VALUE(training || (running_mean && running_var), "batch_norm: running_mean and running_var must be given in evaluation");
  return BatchNorm<statistics>::apply(input, weight, bias, running_mean, running_var, training, momentum, eps, codes, ranges, sample_bits,
                                      bits, group_size, seed, energy);
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
                  const OptionalTensor& running_var, bool training, double momentum, double eps, const OptionalTensor& codes,
                  const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size,
                  const OptionalTensor& seed, const OptionalTensor& energy) {
  return run<false>(input, weight, bias, running_mean, running_var, training, momentum, eps, codes, ranges, sample_bits, bits, group_size,
                    seed, energy)[0];
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_and_statistics(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                                             bool training, double momentum, double eps, const OptionalTensor& codes,
                                                             const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                                                             int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
  const variable_list made = run<true>(input, weight, bias, running_mean, running_var, training, momentum, eps, codes, ranges, sample_bits,
                                       bits, group_size, seed, energy);
  return {made[0], made[1], made[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_and_statistics", batch_norm_and_statistics);
}

}  // namespace quantize::layers
