// clipped_noise and its gradient: activations with a learned end and learned bits. CPU, Meta, and the differentiable op.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "../core/autograd.h"
#include "../core/dispatch.h"
#include "clipped_noise.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using std::tuple;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ClippedNoise read_ends(const Tensor& given, const Tensor& seed) {
  const Tensor ends = given.contiguous();
  const float* end = ends.const_data_ptr<float>();
  return {end[0], end[1], end[2], read_seed("clipped_noise", seed)};
}

Tensor clipped_noise_cpu(const Tensor& input, const Tensor& ends, const Tensor& seed) {
  const Scalar scalar = check_clipped(input, ends);
  const ClippedNoise noise = read_ends(ends, seed);
  const Tensor x = input.contiguous();
  Tensor y = at::empty_like(x);
  const auto& kernels = diffq_kernels(cpu_isa(), scalar);
  at::parallel_for(0, x.numel(), 8 * DiffQTraits::piece,
                   [&](int64_t begin, int64_t end) { kernels.clipped(noise, x.const_data_ptr(), begin, end, y.mutable_data_ptr()); });
  return y;
}

tuple<Tensor, Tensor> clipped_noise_backward_cpu(const Tensor& input_grad, const Tensor& input, const Tensor& ends, const Tensor& seed) {
  const Scalar scalar = check_clipped_backward(input_grad, input, ends);
  const ClippedNoise noise = read_ends(ends, seed);
  const Tensor grad = input_grad.contiguous(), x = input.contiguous();
  Tensor grad_x = at::empty_like(x), sums = at::empty({3}, ends.options());
  const int64_t n = x.numel(), pieces = (n + DiffQTraits::piece - 1) / DiffQTraits::piece;
  std::vector<ClippedSums> parts(pieces);
  const auto& kernels = diffq_kernels(cpu_isa(), scalar);
  at::parallel_for(0, pieces, 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      parts[p] = kernels.clipped_backward(noise, grad.const_data_ptr(), x.const_data_ptr(), n, p, grad_x.mutable_data_ptr());
  });
  double by_noise = 0, above = 0, below = 0;
  for (const ClippedSums& part : parts) by_noise += part.noise, above += part.above, below += part.below;
  float* total = sums.mutable_data_ptr<float>();
  total[0] = float(by_noise), total[1] = float(above), total[2] = float(below);
  return {grad_x, sums};
}

Tensor clipped_noise_meta(const Tensor& x, const Tensor& ends, const Tensor&) {
  check_scalar("clipped_noise", "x", x.scalar_type());
  check_dtype("clipped_noise", "ends", ends, at::kFloat);
  return at::empty_symint(x.sym_sizes(), x.options());
}

tuple<Tensor, Tensor> clipped_noise_backward_meta(const Tensor&, const Tensor& x, const Tensor& ends, const Tensor&) {
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty({3}, ends.options())};
}

// d/d ends of clip(x, ends[0], ends[1]) + n * ends[2]; how the ends and the scale depend on what is learned is ATen's to differentiate.
struct Clipped : torch::autograd::Function<Clipped> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& ends, const Tensor& seed) {
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("quantize::clipped_noise");
    ctx->save_for_backward({x, ends, seed});
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(x, ends, seed);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op =
        find_op<tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("quantize::clipped_noise_backward");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    refuse_double_backward("clipped", "the backward of a quantized activation");
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, sums] = op.call(grads[0], saved[0], saved[1], saved[2]);
    return {grad_x, at::stack({sums[2], sums[1], sums[0]}), Tensor()};
  }
};

Tensor clipped(const Tensor& x, const Tensor& ends, const Tensor& seed) { return Clipped::apply(x, ends, seed); }

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("clipped_noise", clipped_noise_cpu);
  m.impl("clipped_noise_backward", clipped_noise_backward_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("clipped_noise", clipped_noise_meta);
  m.impl("clipped_noise_backward", clipped_noise_backward_meta);
}
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("clipped", clipped); }

}  // namespace quantize::weight
