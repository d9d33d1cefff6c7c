// binary_quantize and binary_backward: CPU and Meta; binarize: the differentiable op over them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../core/autograd.h"
#include "../core/dispatch.h"
#include "../core/grain.h"
#include "binary_call.h"
#include "binary_kernels.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t grain = 4096;  // elements worth a thread

// body(row, tile, sums) for every row, several at a time.
template <typename Body>
void for_rows(const BinaryCall& call, const Body& body) {
  at::parallel_for(0, call.rows, grain_of(grain, call.shape.elements()), [&](int64_t begin, int64_t end) {
    const int64_t size = binary_sums * call.shape.taps;
    std::vector<float> scratch(2 * size);
    for (int64_t row = begin; row < end; ++row) body(row, scratch.data(), scratch.data() + size);
  });
}

Results binary_quantize_cpu(const Tensor& input, double share, bool relative) {
  const Scalar scalar = check_binary(input, share);
  const BinaryCall call(input);
  const Tensor w = input.contiguous();
  Tensor y = at::empty(w.sizes(), w.options()), scale = at::empty({call.rows}, w.options().dtype(at::kFloat));
  Tensor mean = at::empty({call.rows, call.shape.taps}, scale.options()), limit = at::empty({1}, scale.options());
  const int64_t n = call.shape.elements(), row_bytes = n * w.element_size(), taps = call.shape.taps;
  const auto& kernels = binary_kernels(cpu_isa(), scalar);
  const auto* source = static_cast<const uint8_t*>(w.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  float *scales = scale.mutable_data_ptr<float>(), *means = mean.mutable_data_ptr<float>(), *bound = limit.mutable_data_ptr<float>();
  *bound = float(share);
  const auto finish = [&](int64_t row, float* tile) {
    scales[row] = n ? kernels.magnitude(source + row * row_bytes, call.shape, means + row * taps, *bound, tile) / float(n) : 0.f;
    kernels.write(source + row * row_bytes, call.shape, means + row * taps, scales[row], tile, target + row * row_bytes);
  };
  for_rows(call, [&](int64_t row, float* tile, float*) {
    kernels.centre(source + row * row_bytes, call.shape, means + row * taps, tile);
    if (!relative) return finish(row, tile);
    scales[row] = kernels.magnitude(source + row * row_bytes, call.shape, means + row * taps, INFINITY, tile);
  });
  if (relative) {
    double part[binary_sums] = {};
    for (int64_t row = 0; row < call.rows; ++row) part[row % binary_sums] += double(scales[row]);
    *bound = binary_limit(join_parts(part), call.rows * n, share);
    for_rows(call, [&](int64_t row, float* tile, float*) { finish(row, tile); });
  }
  return {y, scale, mean, limit};
}

Tensor binary_backward_cpu(const Tensor& input_grad, const Tensor& input, const Tensor& scale, const Tensor& mean, const Tensor& limit,
                           double factor) {
  const Scalar scalar = check_scalar("binary", "w", input.scalar_type());
  check_binary_backward(input_grad, input, scale, mean, limit);
  const BinaryCall call(input);
  const Tensor w = input.contiguous(), grad = input_grad.contiguous(), scales = scale.contiguous(), means = mean.contiguous();
  Tensor out = at::empty(w.sizes(), w.options());
  const int64_t bytes = call.shape.elements() * w.element_size();
  const auto& kernels = binary_kernels(cpu_isa(), scalar);
  const auto *g = static_cast<const uint8_t*>(grad.const_data_ptr()), *source = static_cast<const uint8_t*>(w.const_data_ptr());
  auto* target = static_cast<uint8_t*>(out.mutable_data_ptr());
  const float bound = *limit.const_data_ptr<float>();
  for_rows(call, [&](int64_t row, float* tile, float* sums) {
    kernels.backward(g + row * bytes, source + row * bytes, call.shape, means.const_data_ptr<float>() + row * call.shape.taps,
                     scales.const_data_ptr<float>()[row], bound, float(factor), tile, sums, target + row * bytes);
  });
  return out;
}

Results binary_quantize_meta(const Tensor& w, double share, bool) {
  check_binary(w, share);
  const auto real = w.options().dtype(at::kFloat);
  c10::SymInt rows = 1, taps = 1;
  if (w.dim() > 1) {
    rows = w.sym_size(0);
    if (w.sym_size(1) > 1)
      for (int64_t d = 2; d < w.dim(); ++d) taps = taps * w.sym_size(d);
  }
  return {at::empty_symint(w.sym_sizes(), w.options()), at::empty_symint({rows}, real), at::empty_symint({rows, taps}, real),
          at::empty({1}, real)};
}

Tensor binary_backward_meta(const Tensor&, const Tensor& w, const Tensor&, const Tensor&, const Tensor&, double) {
  return at::empty_symint(w.sym_sizes(), w.options());
}

struct Binarize : torch::autograd::Function<Binarize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& w, double share, bool relative, double factor) {
    static const auto op = find_op<Results(const Tensor&, double, bool)>("quantize::binary_quantize");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, scale, mean, limit] = op.call(w, share, relative);
    ctx->saved_data["factor"] = factor;
    ctx->save_for_backward({w, scale, mean, limit});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double)>("quantize::binary_backward");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor(), Tensor()};
    refuse_double_backward("binarize", "the backward of a quantized weight");
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], saved[1], saved[2], saved[3], ctx->saved_data["factor"].toDouble()), Tensor(), Tensor(), Tensor()};
  }
};

Tensor binarize(const Tensor& w, double share, bool relative, double factor) { return Binarize::apply(w, share, relative, factor); }

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("binary_quantize", binary_quantize_cpu);
  m.impl("binary_backward", binary_backward_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("binary_quantize", binary_quantize_meta);
  m.impl("binary_backward", binary_backward_meta);
}
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("binarize", binarize); }

}  // namespace quantize::weight
