// binary_quantize and binary_backward on CUDA. Build: setup.py. Specification: binary.h; arguments: binary_call.h.
#include "binary.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "binary_call.h"

namespace quantize::weight {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> binary_quantize_cuda(const Tensor& input, double share, bool relative) {
  const Scalar scalar = check_binary(input, share);
  const BinaryCall call(input);
  Launcher launch(input);
  const Tensor w = input.contiguous();
  Tensor y = at::empty(w.sizes(), w.options()), scale = at::empty({call.rows}, w.options().dtype(at::kFloat)).zero_();
  Tensor mean = at::empty({call.rows, call.shape.taps}, scale.options()), limit = at::full({1}, share, scale.options());
  if (w.numel() == 0) return {y, scale, mean, limit};
  with_type(scalar, [&]<typename T>(T) {
    launch_binary(static_cast<const T*>(w.const_data_ptr()), call.rows, call.shape, share, relative, static_cast<T*>(y.mutable_data_ptr()),
                  scale.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(), limit.mutable_data_ptr<float>(), launch);
  });
  return {y, scale, mean, limit};
}

Tensor binary_backward_cuda(const Tensor& input_grad, const Tensor& input, const Tensor& scale, const Tensor& mean, const Tensor& limit,
                            double factor) {
  const Scalar scalar = check_scalar("binary", "w", input.scalar_type());
  check_binary_backward(input_grad, input, scale, mean, limit);
  const BinaryCall call(input);
  Launcher launch(input);
  const Tensor w = input.contiguous(), grad = input_grad.contiguous(), scales = scale.contiguous(), means = mean.contiguous();
  Tensor out = at::empty(w.sizes(), w.options());
  if (w.numel() == 0) return out;
  with_type(scalar, [&]<typename T>(T) {
    launch_binary_backward(static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(w.const_data_ptr()), call.rows, call.shape,
                           scales.const_data_ptr<float>(), means.const_data_ptr<float>(), limit.const_data_ptr<float>(), float(factor),
                           static_cast<T*>(out.mutable_data_ptr()), launch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("binary_quantize", binary_quantize_cuda);
  m.impl("binary_backward", binary_backward_cuda);
}

}  // namespace quantize::weight
