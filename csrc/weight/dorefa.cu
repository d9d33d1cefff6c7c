// dorefa_quantize, dorefa_backward and dorefa_gradient on CUDA. Build: setup.py. Specification: dorefa.h; arguments: dorefa_call.h.
#include "dorefa.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../core/dense.h"
#include "../core/launch.h"
#include "dorefa_call.h"

namespace quantize::weight {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> dorefa_quantize_cuda(const Tensor& input, int64_t bits, bool adjusted) {
  const Scalar scalar = check_dorefa(input, bits);
  Launcher launch(input);
  const Tensor w = dense(input);
  Tensor y = at::empty_like(w), scale = at::empty({1}, w.options().dtype(at::kFloat)).zero_();
  Tensor stats = at::empty({3}, scale.options()).zero_();
  if (w.numel() == 0) {
    stats.narrow(0, 2, 1).fill_(1);  // the adjustment, as on the CPU
    return {y, scale, stats};
  }
  with_type(scalar, [&]<typename T>(T) {
    launch_dorefa(static_cast<const T*>(w.const_data_ptr()), w.numel(), int(bits), adjusted, static_cast<T*>(y.mutable_data_ptr()),
                  scale.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>(), launch);
  });
  return {y, scale, stats};
}

Tensor dorefa_backward_cuda(const Tensor& input_grad, const Tensor& input, const Tensor& stats) {
  const Scalar scalar = check_dorefa_backward(input_grad, input, stats);
  Launcher launch(input);
  const Tensor w = dense(input), kept = stats.contiguous();
  Tensor out = at::empty_like(w);
  if (w.numel() == 0) return out;
  const Tensor grad = input_grad.strides() == w.strides() ? input_grad : at::empty_like(w).copy_(input_grad);
  with_type(scalar, [&]<typename T>(T) {
    launch_dorefa_backward(static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(w.const_data_ptr()), w.numel(),
                           kept.const_data_ptr<float>(), static_cast<T*>(out.mutable_data_ptr()), launch);
  });
  return out;
}

Tensor dorefa_gradient_cuda(const Tensor& input, int64_t bits, const Tensor& seed) {
  const Scalar scalar = check_gradient(input, bits);
  const Seed own = read_seed("dorefa_gradient", seed);
  Launcher launch(input);
  const Tensor g = activation::packed_memory(input);
  Tensor y = at::empty_strided(g.sizes(), g.strides(), g.options());
  if (g.numel() == 0) return y;
  with_type(scalar, [&]<typename T>(T) {
    launch_gradient(static_cast<const T*>(g.const_data_ptr()), g.numel(), sample_elements(g), int(bits), own,
                    static_cast<T*>(y.mutable_data_ptr()), launch);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("dorefa_quantize", dorefa_quantize_cuda);
  m.impl("dorefa_backward", dorefa_backward_cuda);
  m.impl("dorefa_gradient", dorefa_gradient_cuda);
}

}  // namespace quantize::weight
