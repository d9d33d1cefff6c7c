// channel_quantize and clip_gradient: CPU and Meta; fake_quantize: the differentiable op over them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../core/autograd.h"
#include "../core/checks.h"
#include "../core/dispatch.h"
#include "../core/grain.h"
#include "channel_quantize_call.h"
#include "channel_quantize_kernels.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using std::tuple;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t grain = 4096;  // elements worth a thread

tuple<Tensor, Tensor, Tensor> channel_quantize_cpu(const Tensor& input, c10::string_view name, int64_t bits, bool least_squares) {
  const Scalar scalar = check_scalar("channel_quantize", "w", input.scalar_type());
  const Codebook book = codebook("channel_quantize", {name.data(), name.size()}, bits, least_squares);
  const ChannelLayout layout(input);
  const Tensor w = channel_memory(input);
  Tensor y = at::empty_strided(w.sizes(), w.strides(), w.options());
  Tensor scale = at::empty({layout.channels}, w.options().dtype(at::kFloat)), limit = at::empty_like(scale);
  const auto& kernels = channel_quantize_kernels(cpu_isa(), scalar);
  const auto* source = static_cast<const uint8_t*>(w.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  float *scales = scale.mutable_data_ptr<float>(), *limits = limit.mutable_data_ptr<float>();
  const int64_t row = layout.elements * w.element_size();
  at::parallel_for(0, layout.channels, grain_of(grain, layout.elements), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const ChannelScale own = kernels.quantize(source + c * row, layout.elements, book, target + c * row);
      scales[c] = own.scale, limits[c] = own.limit;
    }
  });
  return {y, scale, limit};
}

Tensor clip_gradient_cpu(const Tensor& input_grad, const Tensor& input, const Tensor& limit) {
  const Scalar scalar = check_clip_gradient(input_grad, input, limit);
  const ChannelLayout layout(input);
  const Tensor w = channel_memory(input), limits = limit.contiguous();
  Tensor y = at::empty_strided(w.sizes(), w.strides(), w.options());
  const Tensor grad = input_grad.strides() == w.strides() ? input_grad : at::empty_like(y).copy_(input_grad);
  const auto& kernels = channel_quantize_kernels(cpu_isa(), scalar);
  const auto *g = static_cast<const uint8_t*>(grad.const_data_ptr()), *x = static_cast<const uint8_t*>(w.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t row = layout.elements * w.element_size();
  at::parallel_for(0, layout.channels, grain_of(grain, layout.elements), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      kernels.clip(g + c * row, x + c * row, layout.elements, limits.const_data_ptr<float>()[c], target + c * row);
  });
  return y;
}

// What channel_memory's result is like.
Tensor shaped_as(const Tensor& w) {
  if (w.dim() > 1 && w.is_non_overlapping_and_dense() && w.sym_numel() != 0 && w.sym_stride(0) == w.sym_numel() / w.sym_size(0))
    return at::empty_strided_symint(w.sym_sizes(), w.sym_strides(), w.options());
  return at::empty_symint(w.sym_sizes(), w.options());
}

tuple<Tensor, Tensor, Tensor> channel_quantize_meta(const Tensor& w, c10::string_view name, int64_t bits, bool least_squares) {
  check_scalar("channel_quantize", "w", w.scalar_type());
  codebook("channel_quantize", {name.data(), name.size()}, bits, least_squares);
  const Tensor scale = at::empty_symint({w.dim() ? w.sym_size(0) : c10::SymInt(1)}, w.options().dtype(at::kFloat));
  return {shaped_as(w), scale, at::empty_like(scale)};
}

Tensor clip_gradient_meta(const Tensor&, const Tensor& w, const Tensor&) { return shaped_as(w); }

// Straight through, but not to weights beyond the largest level.
struct FakeQuantize : torch::autograd::Function<FakeQuantize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& w, c10::string_view name, int64_t bits, bool least_squares) {
    static const auto op =
        find_op<tuple<Tensor, Tensor, Tensor>(const Tensor&, c10::string_view, int64_t, bool)>("quantize::channel_quantize");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, scale, limit] = op.call(w, name, bits, least_squares);
    ctx->saved_data["clips"] = least_squares;
    if (least_squares) ctx->save_for_backward({w, limit});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("quantize::clip_gradient");
    if (!ctx->saved_data["clips"].toBool() || !grads[0].defined()) return {grads[0], Tensor(), Tensor(), Tensor()};
    refuse_double_backward("fake_quantize", "the backward of a quantized weight");
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], saved[1]), Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize(const Tensor& w, c10::string_view name, int64_t bits, bool least_squares) {
  return FakeQuantize::apply(w, name, bits, least_squares);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("channel_quantize", channel_quantize_cpu);
  m.impl("clip_gradient", clip_gradient_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("channel_quantize", channel_quantize_meta);
  m.impl("clip_gradient", clip_gradient_meta);
}
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("fake_quantize", fake_quantize); }

}  // namespace quantize::weight
