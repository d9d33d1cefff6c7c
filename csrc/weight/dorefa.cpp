// dorefa_quantize, dorefa_backward, dorefa_gradient: CPU and Meta; dorefa and quantize_gradient: the differentiable ops over them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../core/autograd.h"
#include "../core/dense.h"
#include "../core/dispatch.h"
#include "../core/grain.h"
#include "binary.h"
#include "dorefa_call.h"
#include "dorefa_kernels.h"

namespace quantize::weight {
namespace {

using activation::packed_memory;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Results = std::tuple<Tensor, Tensor, Tensor>;

int64_t pieces_of(int64_t n) { return (n + dorefa_piece - 1) / dorefa_piece; }

// body(piece, byte offset, elements) for every piece of a tensor.
template <typename Body>
void for_pieces(int64_t n, int64_t item, const Body& body) {
  at::parallel_for(0, pieces_of(n), 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) body(p, p * dorefa_piece * item, std::min(dorefa_piece, n - p * dorefa_piece));
  });
}

// What value(piece) is over all pieces: in sixteen places, then joined.
template <typename Value>
double total_of(int64_t pieces, const Value& value) {
  double part[binary_sums] = {};
  for (int64_t p = 0; p < pieces; ++p) part[p % binary_sums] += double(value(p));
  return join_parts(part);
}

// A tensor's weights, and its sums by pieces.
struct Weights {
  const DorefaKernels& kernels;
  const uint8_t* w;
  int64_t n, item;

  float largest() const {
    std::vector<float> parts(pieces_of(n));
    for_pieces(n, item, [&](int64_t p, int64_t at, int64_t count) { parts[p] = kernels.largest(w + at, count); });
    float high = 0.f, poison = 0.f;
    for (float part : parts) high = part > high ? part : high, poison += part * 0.f;
    return high + poison;
  }

  double magnitudes() const {
    std::vector<float> parts(pieces_of(n));
    for_pieces(n, item, [&](int64_t p, int64_t at, int64_t count) { parts[p] = kernels.magnitudes(w + at, count); });
    return total_of(pieces_of(n), [&](int64_t p) { return parts[p]; });
  }

  template <typename Kernel>
  DorefaSpread spread(const Kernel& kernel) const {
    std::vector<DorefaPart> parts(pieces_of(n));
    for_pieces(n, item, [&](int64_t p, int64_t at, int64_t count) { parts[p] = kernel(w + at, count); });
    return {total_of(pieces_of(n), [&](int64_t p) { return parts[p].sum; }),
            total_of(pieces_of(n), [&](int64_t p) { return parts[p].square; })};
  }

  float adjustment(float first, DorefaGrid grid) const {
    const float level = dorefa_level(tanh_near(first), grid.half, grid.levels, 0.f);
    return dorefa_adjustment(spread([&](const void* x, int64_t count) { return kernels.spread(x, count, first); }),
                             spread([&](const void* x, int64_t count) { return kernels.spread_of_levels(x, count, grid, level); }), n,
                             grid.levels);
  }
};

float first_of(const Weights& weights, Scalar scalar) {
  return scalar == Scalar::f32   ? to_float(*reinterpret_cast<const F32*>(weights.w))
         : scalar == Scalar::f16 ? to_float(*reinterpret_cast<const F16*>(weights.w))
                                 : to_float(*reinterpret_cast<const BF16*>(weights.w));
}

Results dorefa_quantize_cpu(const Tensor& input, int64_t bits, bool adjusted) {
  const Scalar scalar = check_dorefa(input, bits);
  const Tensor w = dense(input);
  Tensor y = at::empty_like(w), scale = at::empty({1}, w.options().dtype(at::kFloat)), stats = at::empty({3}, scale.options());
  const Weights weights{dorefa_kernels(cpu_isa(), scalar), static_cast<const uint8_t*>(w.const_data_ptr()), w.numel(), w.element_size()};
  float *step = scale.mutable_data_ptr<float>(), *kept = stats.mutable_data_ptr<float>();
  *step = kept[0] = kept[1] = 0.f, kept[2] = 1.f;
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  if (weights.n == 0) return {y, scale, stats};
  if (bits == 1) {
    *step = float(weights.magnitudes() / double(weights.n));
    for_pieces(weights.n, weights.item,
               [&](int64_t, int64_t at, int64_t n) { weights.kernels.sign(weights.w + at, n, *step, target + at); });
    return {y, scale, stats};
  }
  const float levels = float((1 << bits) - 1), largest = weights.largest(), top = tanh_near(largest);
  DorefaGrid grid{dorefa_half(top), levels, 0.f};
  kept[0] = largest, kept[1] = top;
  if (adjusted) kept[2] = weights.adjustment(first_of(weights, scalar), grid);
  if (largest != largest) kept[2] = largest;
  *step = grid.step = kept[2] / levels;
  for_pieces(weights.n, weights.item,
             [&](int64_t, int64_t at, int64_t n) { weights.kernels.quantize(weights.w + at, n, grid, target + at); });
  return {y, scale, stats};
}

Tensor dorefa_backward_cpu(const Tensor& input_grad, const Tensor& input, const Tensor& stats) {
  const Scalar scalar = check_dorefa_backward(input_grad, input, stats);
  const Tensor w = dense(input);
  Tensor out = at::empty_like(w);
  const Tensor grad = input_grad.strides() == w.strides() ? input_grad : at::empty_like(w).copy_(input_grad);
  const auto& kernels = dorefa_kernels(cpu_isa(), scalar);
  const auto *g = static_cast<const uint8_t*>(grad.const_data_ptr()), *x = static_cast<const uint8_t*>(w.const_data_ptr());
  auto* target = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Tensor values = stats.contiguous();
  const float* kept = values.const_data_ptr<float>();
  const int64_t n = w.numel(), item = w.element_size();
  std::vector<DorefaProducts> parts(pieces_of(n));
  for_pieces(n, item, [&](int64_t p, int64_t at, int64_t count) { parts[p] = kernels.products(g + at, x + at, count, kept[0]); });
  const DorefaSlope slope = dorefa_slope({kept[0], kept[1], kept[2]}, total_of(pieces_of(n), [&](int64_t p) { return parts[p].product; }),
                                         total_of(pieces_of(n), [&](int64_t p) { return parts[p].count; }));
  for_pieces(n, item, [&](int64_t, int64_t at, int64_t count) { kernels.backward(g + at, x + at, count, slope, target + at); });
  return out;
}

Tensor dorefa_gradient_cpu(const Tensor& input, int64_t bits, const Tensor& seed) {
  const Scalar scalar = check_gradient(input, bits);
  const Seed own = read_seed("dorefa_gradient", seed);
  const Tensor g = packed_memory(input);
  Tensor y = at::empty_strided(g.sizes(), g.strides(), g.options());
  const int64_t n = g.numel(), elements = sample_elements(g), samples = elements ? n / elements : 0, item = g.element_size();
  const float levels = float((1 << bits) - 1);
  const auto& kernels = dorefa_kernels(cpu_isa(), scalar);
  const auto* source = static_cast<const uint8_t*>(g.const_data_ptr());
  std::vector<GradientGrid> grids(samples);
  at::parallel_for(0, samples, grain_of(8 * dorefa_piece, elements), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) grids[s] = gradient_grid(kernels.largest(source + s * elements * item, elements), levels);
  });
  at::parallel_for(0, n, 8 * dorefa_piece, [&](int64_t begin, int64_t end) {
    kernels.gradient(own, source, begin, end, elements, grids.data(), levels, y.mutable_data_ptr());
  });
  return y;
}

Results dorefa_quantize_meta(const Tensor& w, int64_t bits, bool) {
  check_dorefa(w, bits);
  const Tensor scale = at::empty({1}, w.options().dtype(at::kFloat));
  return {at::empty_like(w), scale, at::empty({3}, scale.options())};
}

Tensor dorefa_backward_meta(const Tensor&, const Tensor& w, const Tensor&) { return at::empty_like(w); }

Tensor dorefa_gradient_meta(const Tensor& g, int64_t bits, const Tensor&) {
  check_gradient(g, bits);
  return activation::empty_packed(g);
}

struct Dorefa : torch::autograd::Function<Dorefa> {
  static Tensor forward(AutogradContext* ctx, const Tensor& w, int64_t bits, bool adjusted) {
    static const auto op = find_op<Results(const Tensor&, int64_t, bool)>("quantize::dorefa_quantize");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, scale, stats] = op.call(w, bits, adjusted);
    ctx->saved_data["bits"] = bits;
    if (bits > 1) ctx->save_for_backward({w, stats});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&)>("quantize::dorefa_backward");
    if (ctx->saved_data["bits"].toInt() == 1 || !grads[0].defined()) return {grads[0], Tensor(), Tensor()};
    refuse_double_backward("dorefa", "the backward of a quantized weight");
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], saved[1]), Tensor(), Tensor()};
  }
};

// x itself, whose gradient is quantized on its way back.
struct QuantizeGradient : torch::autograd::Function<QuantizeGradient> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t bits, const Tensor& seed) {
    ctx->saved_data["bits"] = bits;
    ctx->save_for_backward({seed});
    at::AutoDispatchBelowADInplaceOrView below;
    return x.alias();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<Tensor(const Tensor&, int64_t, const Tensor&)>("quantize::dorefa_gradient");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    refuse_double_backward("quantize_gradient", "a quantized gradient");
    return {op.call(grads[0], ctx->saved_data["bits"].toInt(), ctx->get_saved_variables()[0]), Tensor(), Tensor()};
  }
};

Tensor dorefa(const Tensor& w, int64_t bits, bool adjusted) { return Dorefa::apply(w, bits, adjusted); }

Tensor quantize_gradient(const Tensor& x, int64_t bits, const Tensor& seed) {
  check_gradient(x, bits);
  return QuantizeGradient::apply(x, bits, seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("dorefa_quantize", dorefa_quantize_cpu);
  m.impl("dorefa_backward", dorefa_backward_cpu);
  m.impl("dorefa_gradient", dorefa_gradient_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("dorefa_quantize", dorefa_quantize_meta);
  m.impl("dorefa_backward", dorefa_backward_meta);
  m.impl("dorefa_gradient", dorefa_gradient_meta);
}
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("dorefa", dorefa);
  m.impl("quantize_gradient", quantize_gradient);
}

}  // namespace quantize::weight
