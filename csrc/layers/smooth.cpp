// smooth: SiLU, hardswish, GELU and Mish, which keep their derivative at the input packed.
//
// The input gradient is grad * f'(x), linear in what is packed, so its mean is exact; a packed x would bias it. And f' stays between
// -0.5 and 1.5 whatever x is, so the noise does not grow with the activations.
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/library.h>

#include "energy.h"

namespace quantize::layers {
namespace {

struct Function {
  const char* name;
  Tensor (*forward)(const Tensor& x);
  Tensor& (*forward_)(Tensor& x);
  Tensor (*backward)(const Tensor& grad, const Tensor& x);
};

constexpr Function functions[] = {
    {"silu", at::silu, at::silu_, at::silu_backward},
    {"hardswish", at::hardswish, at::hardswish_, at::hardswish_backward},
    {"mish", at::mish, at::mish_, at::mish_backward},
    {"gelu", [](const Tensor& x) { return at::gelu(x, "none"); }, [](Tensor& x) -> Tensor& { return at::gelu_(x, "none"); },
     [](const Tensor& grad, const Tensor& x) { return at::gelu_backward(grad, x, "none"); }},
    {"gelu_tanh", [](const Tensor& x) { return at::gelu(x, "tanh"); }, [](Tensor& x) -> Tensor& { return at::gelu_(x, "tanh"); },
     [](const Tensor& grad, const Tensor& x) { return at::gelu_backward(grad, x, "tanh"); }},
};

const Function& find(c10::string_view name) {
  for (const Function& f : functions)
    if (name == f.name) return f;
  TORCH_CHECK_VALUE(false, "smooth: function must be silu, hardswish, mish, gelu or gelu_tanh; got ", name);
}

Tensor smooth_derivative(const Tensor& input, c10::string_view function) {
  at::AutoDispatchBelowADInplaceOrView below;
  const Tensor derivative = find(function).backward(at::ones_like(input), input);
  // In the memory order that the packing is decoded to, which is the input's.
  const auto strides = activation::packed_strides(input.sym_sizes(), input.sym_strides());
  if (derivative.sym_strides() == c10::SymIntArrayRef(strides)) return derivative;
  return at::empty_strided_symint(input.sym_sizes(), strides, input.options()).copy_(derivative);
}

template <bool in_place>
struct Smooth : torch::autograd::Function<Smooth<in_place>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const std::string& function, const PackedArguments& packed) {
    save_packed(ctx, input, packed);
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
    result[0] = grads[0] * unpack_saved(ctx, saved.data());
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
  return Smooth<false>::apply(input, std::string(function), PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
}

Tensor& smooth_(Tensor& input, c10::string_view function, const OptionalTensor& codes, const OptionalTensor& ranges,
                const OptionalTensor& sample_bits, int64_t bits, int64_t group_size, const OptionalTensor& seed,
                const OptionalTensor& energy) {
  input = Smooth<true>::apply(input, std::string(function), PackedArguments{codes, ranges, sample_bits, bits, group_size, seed, energy});
  return input;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("smooth", smooth);
  m.impl("smooth_", smooth_);
  m.impl("smooth_derivative", smooth_derivative);
}

}  // namespace quantize::layers
