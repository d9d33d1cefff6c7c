// layer_norm, rms_norm, group_norm, instance_norm: they normalize rows, each of which lies in one sample. Statistics and output come from
// the full-precision input. What is kept packed is the normalized input x^, before weight and bias: rows that differ in size a thousandfold
// share groups, and noise of the large ones' size, divided by the small ones' deviation, would be all that is left of their gradient.
//
// With g the output's gradient, weighed, a row's is inverse_std * (g - mean g - x^ * mean(g x^)): ATen's backward for rows whose mean is 0
// and whose deviation is 1, times inverse_std. Those of weight and bias are linear in x^, so their means are exact. The input's has x^ in
// it twice: of a row of n elements it is off by the noise's variance over n.
#include <ATen/ops/_fused_rms_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "channel_shape.h"
#include "energy.h"

namespace quantize::layers {
namespace {

using Mask = std::array<bool, 3>;  // input, weight, bias

struct Gradients {
  Tensor input, weight, bias;
};

// What a norm is, beside its input. `shape`: of a layer's or RMS norm's rows; a group norm's number of groups.
struct RowArguments {
  const OptionalTensor &weight, &bias, &running_mean, &running_var;
  at::IntArrayRef shape;
  double momentum;
  std::optional<double> eps;
};

struct Normalized {
  Tensor output, inverse_std;
};

// What its backward reads.
struct Kept {
  Tensor x;  // normalized
  OptionalTensor weight, bias;
  Tensor inverse_std;
  std::vector<int64_t> shape;

  Tensor zeros() const { return at::zeros_like(inverse_std); }
  Tensor ones() const { return at::ones_like(inverse_std); }
};

// Norms over the last dimensions: how a weight, and one value a row, stand against [..., n].
struct OfRows {
  static Tensor weigh(const Tensor& grad, const Tensor& weight) { return grad * weight; }
  static Tensor spread(const Tensor& of_rows, const Tensor&) { return of_rows; }
};

// Norms over one channel or several of a sample: against [N, C, ...].
struct OfChannels {
  static Tensor weigh(const Tensor& grad, const Tensor& weight) { return grad * weight.view(channel_shape(grad)); }

  static Tensor spread(const Tensor& of_rows, const Tensor& x) {
    std::vector<int64_t> shape(x.dim(), 1);
    shape[0] = x.size(0), shape[1] = x.size(1);
    const Tensor rows = of_rows.view({x.size(0), -1});
    return rows.repeat_interleave(x.size(1) / rows.size(1), 1).view(shape);
  }
};

struct LayerNorm : OfRows {
  static constexpr const char* name = "layer_norm";

  static Normalized forward(const Tensor& x, const RowArguments& a) {
    auto [output, mean, inverse_std] = at::native_layer_norm(x, a.shape, a.weight, a.bias, *a.eps);
    return {output, inverse_std};
  }

  static Gradients backward(const Tensor& grad, const Kept& k, const Mask& mask) {
    auto [input, weight, bias] = at::native_layer_norm_backward(grad, k.x, k.shape, k.zeros(), k.ones(), k.weight, k.bias, mask);
    return {input, weight, bias};
  }
};

struct RmsNorm : OfRows {
  static constexpr const char* name = "rms_norm";

  static Normalized forward(const Tensor& x, const RowArguments& a) {
    auto [output, inverse_std] = at::_fused_rms_norm(x, a.shape, a.weight, a.eps);
    return {output, inverse_std};
  }

  static Gradients backward(const Tensor& grad, const Kept& k, const Mask& mask) {
    std::vector<int64_t> row, others;
    for (int64_t d = 0; d < grad.dim(); ++d) (d < grad.dim() - int64_t(k.shape.size()) ? others : row).push_back(d);
    Gradients result;
    if (mask[0]) {
      const Tensor g = k.weight ? grad * *k.weight : grad;
      const Tensor mean = (g * k.x).mean(row, /*keepdim=*/true, at::kFloat);
      result.input = (g - k.x * mean).to(grad.scalar_type());
    }
    if (mask[1]) result.weight = (grad * k.x).sum(others, /*keepdim=*/false, at::kFloat).to(k.weight->scalar_type());
    return result;
  }
};

struct GroupNorm : OfChannels {
  static constexpr const char* name = "group_norm";

  // As at::group_norm orders what it is given: channels last on the CPU only.
  static Tensor ordered(const Tensor& x, const Tensor& like) {
    return x.contiguous(like.is_cpu() ? like.suggest_memory_format() : at::MemoryFormat::Contiguous);
  }

  static int64_t positions(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(2)); }
  static OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

  static Normalized forward(const Tensor& x, const RowArguments& a) {
    auto [output, mean, inverse_std] =
        at::native_group_norm(ordered(x, x), dense(a.weight), dense(a.bias), x.size(0), x.size(1), positions(x), a.shape[0], *a.eps);
    return {output, inverse_std};
  }

  static Gradients backward(const Tensor& grad, const Kept& k, const Mask& mask) {
    const Tensor& x = k.x;
    auto [input, weight, bias] = at::native_group_norm_backward(ordered(grad, x), ordered(x, x), k.zeros(), k.ones(), dense(k.weight),
                                                                x.size(0), x.size(1), positions(x), k.shape[0], mask);
    return {input, weight, bias};
  }
};

// A batch norm of one sample whose channels are those of all samples, as at::instance_norm has it.
struct InstanceNorm : OfChannels {
  static constexpr const char* name = "instance_norm";

  static Tensor as_one(const Tensor& x) {
    std::vector<int64_t> shape{1, x.size(0) * x.size(1)};
    shape.insert(shape.end(), x.sizes().begin() + 2, x.sizes().end());
    return x.contiguous().view(shape);
  }

  static OptionalTensor repeated(const OptionalTensor& t, int64_t samples) { return t ? OptionalTensor(t->repeat({samples})) : t; }

  static Normalized forward(const Tensor& x, const RowArguments& a) {
    const int64_t samples = x.size(0), channels = x.size(1);
    const OptionalTensor running_mean = repeated(a.running_mean, samples), running_var = repeated(a.running_var, samples);
    auto [output, mean, inverse_std] = at::native_batch_norm(as_one(x), repeated(a.weight, samples), repeated(a.bias, samples),
                                                             running_mean, running_var, /*training=*/true, a.momentum, *a.eps);
    if (running_mean) a.running_mean->copy_(running_mean->view({samples, channels}).mean(0));
    if (running_var) a.running_var->copy_(running_var->view({samples, channels}).mean(0));
    return {output.view(x.sizes()), inverse_std};
  }

  static Gradients backward(const Tensor& grad, const Kept& k, const Mask& mask) {
    const int64_t samples = grad.size(0), channels = grad.size(1);
    auto [input, weight, bias] = at::native_batch_norm_backward(as_one(grad), as_one(k.x), repeated(k.weight, samples), {}, {}, k.zeros(),
                                                                k.ones(), /*train=*/true, /*eps=*/0., mask);
    const auto of_all = [&](const Tensor& t) { return t.defined() ? t.view({samples, channels}).sum(0) : t; };
    return {input.defined() ? input.view(grad.sizes()) : input, of_all(weight), of_all(bias)};
  }
};

// Of energy.h, for noise in x^, which reaches the input's gradient directly and through mean(g x^). Rows are many, so both are taken as
// incoherent.
template <typename Norm>
Tensor row_energy(const Tensor& grad, const Kept& k, const Tensor& grad_input) {
  const int64_t samples = grad.size(0), rows = k.inverse_std.numel(), length = grad.numel() / rows;
  const auto as_rows = [&](const Tensor& t) { return t.to(at::kFloat).contiguous().view({rows, length}); };
  const auto of_samples = [&](const Tensor& t) { return t.view({samples, -1}).mean(1); };
  const Tensor g = as_rows(grad), weighed = k.weight ? as_rows(Norm::weigh(grad, *k.weight)) : g;
  const Tensor correlation = (weighed * as_rows(k.x)).mean(1), gain = k.inverse_std.to(at::kFloat).reshape(rows).square();
  const Tensor through = gain * (correlation.square() + weighed.square().mean(1) / double(length));
  Tensor energy = at::empty({samples, 2}, g.options());
  energy.select(1, 0).copy_(of_samples(g.square().mean(1)));
  energy.select(1, 1).copy_(of_samples(through) / grad_input.to(at::kFloat).square().sum().clamp_min(1e-30));
  return energy;
}

template <typename Norm>
struct RowNorm : torch::autograd::Function<RowNorm<Norm>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const RowArguments& arguments, const PackedArguments& packed) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Normalized made = Norm::forward(input, arguments);
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, made.output, packed);  // whose order the normalized input has
    numbers.put_list(arguments.shape).save();
    variable_list saved = packed_tensors(packed);
    saved.insert(saved.end(), {weight.value_or(Tensor()), bias.value_or(Tensor()), made.inverse_std});
    ctx->save_for_backward(std::move(saved));
    return made.output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward(Norm::name);
    variable_list result(5);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    NumberReader numbers(ctx);
    const SavedActivation packed(numbers);
    const Kept kept{packed.unpack(saved.data()), optional(4), optional(5), saved[6], numbers.get_ints()};
    const Tensor grad = grads[0].to(packed.dtype);
    const OptionalTensor energy = saved_energy(ctx);
    // Arguments that are None have no number.
    const Mask mask{ctx->needs_input_grad(0) || energy, kept.weight && ctx->needs_input_grad(1),
                    kept.bias && ctx->needs_input_grad(kept.weight ? 2 : 1)};
    Gradients gradients = Norm::backward(grad, kept, mask);
    if (mask[0]) gradients.input = gradients.input.mul_(Norm::spread(kept.inverse_std, grad));
    if (energy) energy->copy_(row_energy<Norm>(grad, kept, gradients.input));
    if (ctx->needs_input_grad(0)) result[0] = gradients.input;
    result[1] = gradients.weight, result[2] = gradients.bias;
    return result;
  }
};

template <typename Norm>
Tensor run(const Tensor& input, const RowArguments& arguments, const PackedArguments& packed) {
  return RowNorm<Norm>::apply(input, arguments.weight, arguments.bias, arguments, packed);
}

Tensor layer_norm(const Tensor& input, at::IntArrayRef shape, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                  const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                  int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
  return run<LayerNorm>(input, {weight, bias, {}, {}, shape, 0., eps}, {codes, ranges, sample_bits, bits, group_size, seed, energy});
}

Tensor rms_norm(const Tensor& input, at::IntArrayRef shape, const OptionalTensor& weight, std::optional<double> eps,
                const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
  return run<RmsNorm>(input, {weight, {}, {}, {}, shape, 0., eps}, {codes, ranges, sample_bits, bits, group_size, seed, energy});
}

Tensor group_norm(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                  const OptionalTensor& codes, const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                  int64_t group_size, const OptionalTensor& seed, const OptionalTensor& energy) {
  return run<GroupNorm>(input, {weight, bias, {}, {}, groups, 0., eps}, {codes, ranges, sample_bits, bits, group_size, seed, energy});
}

Tensor instance_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, double momentum, double eps, const OptionalTensor& codes,
                     const OptionalTensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size,
                     const OptionalTensor& seed, const OptionalTensor& energy) {
  return run<InstanceNorm>(input, {weight, bias, running_mean, running_var, {}, momentum, eps},
                           {codes, ranges, sample_bits, bits, group_size, seed, energy});
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("rms_norm", rms_norm);
  m.impl("group_norm", group_norm);
  m.impl("instance_norm", instance_norm);
}

}  // namespace quantize::layers
