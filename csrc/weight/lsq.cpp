// lsq_quantize and lsq_backward: CPU and Meta; lsq: the differentiable op over them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../core/autograd.h"
#include "../core/dense.h"
#include "../core/dispatch.h"
#include "lsq_call.h"
#include "lsq_kernels.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using std::tuple;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t piece = 16384;  // elements; sums are of fixed pieces, so that threads do not matter

LsqRange read_range(const Tensor& step, const Tensor& zero_point, int64_t levels) {
  return lsq_range(*step.const_data_ptr<float>(), *zero_point.const_data_ptr<float>(), int(levels));
}

// Strides as at::empty_like gives them, which is what the Meta kernels say.
Tensor lsq_quantize_cpu(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t levels) {
  const auto& kernels = lsq_kernels(cpu_isa(), check_lsq(input, step, zero_point, levels));
  const LsqRange range = read_range(step, zero_point, levels);
  const Tensor x = dense(input);
  Tensor y = at::empty_like(x);
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t size = x.element_size();
  at::parallel_for(0, x.numel(), piece,
                   [&](int64_t begin, int64_t end) { kernels.quantize(source + begin * size, end - begin, range, target + begin * size); });
  return y;
}

tuple<Tensor, Tensor> lsq_backward_cpu(const Tensor& input_grad, const Tensor& input, const Tensor& step, const Tensor& zero_point,
                                       int64_t levels, double scale) {
  const auto& kernels = lsq_kernels(cpu_isa(), check_lsq_backward(input_grad, input, step, zero_point, levels));
  const LsqRange range = read_range(step, zero_point, levels);
  const Tensor x = dense(input);
  Tensor y = at::empty_like(x);
  const Tensor grad = input_grad.strides() == x.strides() ? input_grad : at::empty_like(x).copy_(input_grad);
  const auto *g = static_cast<const uint8_t*>(grad.const_data_ptr()), *source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t n = x.numel(), size = x.element_size(), pieces = (n + piece - 1) / piece;
  std::vector<float> sums(pieces);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * piece, count = std::min(piece, n - first);
      sums[p] = kernels.backward(g + first * size, source + first * size, count, range, target + first * size);
    }
  });
  double total = 0;
  for (float sum : sums) total += sum;
  return {y, at::scalar_tensor(total * scale, step.options()).view(step.sizes())};
}

Tensor lsq_quantize_meta(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t levels) {
  check_lsq(x, step, zero_point, levels);
  return at::empty_like(x);
}

tuple<Tensor, Tensor> lsq_backward_meta(const Tensor&, const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t levels,
                                        double) {
  check_lsq(x, step, zero_point, levels);
  return {at::empty_like(x), at::empty_like(step)};
}

struct Lsq : torch::autograd::Function<Lsq> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t levels,
                        double grad_scale) {
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>("quantize::lsq_quantize");
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["levels"] = levels;
    ctx->saved_data["grad_scale"] = grad_scale;
    ctx->save_for_backward({x, step, zero_point});
    return op.call(x, step, zero_point, levels);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double)>(
        "quantize::lsq_backward");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    refuse_double_backward("lsq", "the backward of a quantized tensor");
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_step] =
        op.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["levels"].toInt(), ctx->saved_data["grad_scale"].toDouble());
    return {grad_x, grad_step, Tensor(), Tensor(), Tensor()};
  }
};

Tensor lsq(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t levels, double grad_scale) {
  return Lsq::apply(x, step, zero_point, levels, grad_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("lsq_quantize", lsq_quantize_cpu);
  m.impl("lsq_backward", lsq_backward_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("lsq_quantize", lsq_quantize_meta);
  m.impl("lsq_backward", lsq_backward_meta);
}
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("lsq", lsq); }

}  // namespace quantize::weight
