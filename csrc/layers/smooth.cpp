// smooth: SiLU, hardswish, GELU, Mish and others, which keep their derivative at the input packed.
//
// The input gradient is grad * f'(x), linear in what is packed, so its mean is exact; a packed x would bias it. And f' stays between
// -0.5 and 1.5 whatever x is, so the noise does not grow with the activations.
#include <ATen/Parallel.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include "../activation/group_stream.h"
#include "energy.h"
#include "smooth_call.h"
#include "smooth_kernels.h"

namespace quantize::layers {
namespace {

using std::tuple;

struct Function {
  c10::string_view name;
  Tensor (*forward)(const Tensor& x);
  Tensor& (*forward_)(Tensor& x);
};

const Function& find(c10::string_view name) {
  static constexpr Function functions[] = {
      {"silu", at::silu, at::silu_},
      {"hardswish", at::hardswish, at::hardswish_},
      {"mish", at::mish, at::mish_},
      {"gelu", [](const Tensor& x) { return at::gelu(x, "none"); }, [](Tensor& x) -> Tensor& { return at::gelu_(x, "none"); }},
      {"gelu_tanh", [](const Tensor& x) { return at::gelu(x, "tanh"); }, [](Tensor& x) -> Tensor& { return at::gelu_(x, "tanh"); }},
      // Whose derivatives the caller makes.
      {"sigmoid", at::sigmoid, at::sigmoid_},
      {"tanh", at::tanh, at::tanh_},
      {"elu", [](const Tensor& x) { return at::elu(x); }, [](Tensor& x) -> Tensor& { return at::elu_(x); }},
      {"softplus", [](const Tensor& x) { return at::softplus(x); }, [](Tensor& x) -> Tensor& { return x.copy_(at::softplus(x)); }},
      {"cube", [](const Tensor& x) { return x.pow(3); }, [](Tensor& x) -> Tensor& { return x.pow_(3); }},
  };
  for (const Function& function : functions)
    if (function.name == name) return function;
  parse_smooth(name);  // which says what there is
  return functions[0];
}

Tensor smooth_derivative_cpu(const Tensor& input, c10::string_view name) {
  const Smooth function = parse_smooth(name);
  const Scalar scalar = check_scalar("smooth_derivative", "input", input.scalar_type());
  const Tensor x = activation::packed_memory(input);
  Tensor y = at::empty_strided(x.sizes(), x.strides(), x.options());
  const int64_t item = x.element_size();
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.data_ptr());
  at::parallel_for(0, x.numel(), 16384, [&](int64_t begin, int64_t end) {
    smooth_kernel(cpu_isa(), scalar, function)(source + begin * item, end - begin, target + begin * item);
  });
  return y;
}

Tensor smooth_derivative_meta(const Tensor& input, c10::string_view name) {
  parse_smooth(name);
  check_scalar("smooth_derivative", "input", input.scalar_type());
  return activation::empty_packed(input);
}

tuple<Tensor, Tensor> smooth_quantize_cpu(const Tensor& x, c10::string_view name, int64_t bits, int64_t group_size, const Tensor& seed) {
  const Scalar scalar = check_scalar("smooth_quantize", "input", x.scalar_type());
  const auto kernel = smooth_kernel(cpu_isa(), scalar, parse_smooth(name));
  const auto make = [&](const void* x, activation::Stretch stretch, void* made) { kernel(x, stretch.n, made); };
  return activation::quantize_made("smooth_quantize", x, make, bits, group_size, seed);
}

// Of other backends, and of traces: as two ops.
tuple<Tensor, Tensor> smooth_quantize(const Tensor& x, c10::string_view name, int64_t bits, int64_t group_size, const Tensor& seed) {
  static const auto derivative = find_op<Tensor(const Tensor&, c10::string_view)>("quantize::smooth_derivative");
  static const auto quantize = find_op<tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t, const Tensor&)>("quantize::group_quantize");
  return quantize.call(derivative.call(x, name), bits, group_size, seed);
}

Tensor smooth_backward_cpu(const Tensor& input, const Tensor& codes, const Tensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                           int64_t group_size, const Tensor& seed) {
  const Scalar scalar = check_scalar("smooth_backward", "grad", input.scalar_type());
  const Tensor grad = activation::packed_memory(input);
  return activation::dequantize_and_join("smooth_backward", codes, ranges, sample_bits, bits, group_size, seed,
                                         multiply_kernel(cpu_isa(), scalar), grad);
}

Tensor smooth_backward(const Tensor& grad, const Tensor& codes, const Tensor& ranges, const OptionalTensor& sample_bits, int64_t bits,
                       int64_t group_size, const Tensor& seed) {
  const auto stride = activation::packed_strides(grad.sym_sizes(), grad.sym_strides());
  return group_dequantize()
      .call(codes, ranges, sample_bits, bits, group_size, grad.sym_sizes(), stride, grad.scalar_type(), seed)
      .mul_(grad);
}

template <bool in_place>
struct PackedSmooth : torch::autograd::Function<PackedSmooth<in_place>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const std::string& function, const PackedArguments& packed) {
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, input, packed);
    numbers.save();
    ctx->save_for_backward(packed_tensors(packed));
    at::AutoDispatchBelowADInplaceOrView below;
    if constexpr (in_place) {
      Tensor x = input;
      find(function).forward_(x);
      ctx->mark_dirty({x});
      return x;
    } else {
      return find(function).forward(input);
    }
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("smooth");
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, const Tensor&)>(
            "quantize::smooth_backward");
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const OptionalTensor sample_bits = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    result[0] =
        op.call(kept.layout.ordered(grads[0].to(kept.dtype)), saved[0], saved[1], sample_bits, kept.bits, kept.group_size, saved[3]);
    if (const OptionalTensor energy = saved_energy(ctx)) {
      // The noise is in the input gradient alone: an element's is that of its derivative times its output gradient.
      energy->select(1, 0).zero_();
      const double elements = double(grads[0].numel()) / double(grads[0].size(0));
      energy->select(1, 1).copy_(sample_energy(grads[0]) / sample_energy(result[0]).sum().clamp_min(1e-30) / elements);
    }
    return result;
  }
};

Tensor smooth(const Tensor& input, c10::string_view function, const OptionalTensor& codes, const OptionalTensor& ranges,
              const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
              const OptionalTensor& energy) {
  return PackedSmooth<false>::apply(input, std::string(function),
                                    PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
}

Tensor& smooth_(Tensor& input, c10::string_view function, const OptionalTensor& codes, const OptionalTensor& ranges,
                const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
                const OptionalTensor& energy) {
  input =
      PackedSmooth<true>::apply(input, std::string(function), PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
  return input;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("smooth", smooth);
  m.impl("smooth_", smooth_);
}

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("smooth_derivative", smooth_derivative_cpu);
  m.impl("smooth_quantize", smooth_quantize_cpu);
  m.impl("smooth_backward", smooth_backward_cpu);
}

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("smooth_quantize", smooth_quantize);
  m.impl("smooth_backward", smooth_backward);
}

TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("smooth_derivative", smooth_derivative_meta);
  m.impl("smooth_quantize", smooth_quantize);
  m.impl("smooth_backward", smooth_backward);
}

}  // namespace quantize::layers
