// round_power_of_two, lsq_quantize and lsq_backward on CUDA. Build: setup.py. Arguments: power_of_two.cpp, lsq_call.h.
#include "elementwise.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "../core/dense.h"
#include "../core/launch.h"
#include "lsq_call.h"

namespace quantize::weight {
namespace {

using at::Tensor;

__global__ void __launch_bounds__(ElementTraits::threads) round_doubles(const double* __restrict__ x, int64_t n, bool plus, double* y) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    y[i] = __longlong_as_double(round_power_of_two_bits<Float64Format>(uint64_t(__double_as_longlong(x[i])), plus));
}

dim3 grid_of(const Launcher& launch, int64_t n) {
  return dim3(unsigned(grid_size(launch.processors(), ElementTraits::blocks, n, ElementTraits::threads)));
}

Tensor round_power_of_two_cuda(const Tensor& input, bool plus) {
  Launcher launch(input);
  const Tensor x = dense(input);
  Tensor y = at::empty_like(x);
  const int64_t n = x.numel();
  if (x.scalar_type() == at::kDouble) {
    if (n)
      launch(round_doubles, grid_of(launch, n), ElementTraits::threads, x.const_data_ptr<double>(), n, plus, y.mutable_data_ptr<double>());
    return y;
  }
  const Scalar scalar = check_scalar("power_of_two", "x", x.scalar_type());
  if (n == 0) return y;
  with_type(scalar, [&]<typename T>(T) {
    launch(round_elements<T>, grid_of(launch, n), ElementTraits::threads, static_cast<const T*>(x.const_data_ptr()), n, plus,
           static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

Tensor lsq_quantize_cuda(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t levels) {
  const Scalar scalar = check_lsq(input, step, zero_point, levels);
  Launcher launch(input);
  const Tensor x = dense(input);
  Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  with_type(scalar, [&]<typename T>(T) {
    launch(lsq_elements<T>, grid_of(launch, x.numel()), ElementTraits::threads, static_cast<const T*>(x.const_data_ptr()), x.numel(),
           step.const_data_ptr<float>(), zero_point.const_data_ptr<float>(), int(levels), static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

std::tuple<Tensor, Tensor> lsq_backward_cuda(const Tensor& input_grad, const Tensor& input, const Tensor& step, const Tensor& zero_point,
                                             int64_t levels, double scale) {
  const Scalar scalar = check_lsq_backward(input_grad, input, step, zero_point, levels);
  Launcher launch(input);
  const Tensor x = dense(input);
  Tensor grad_x = at::empty_like(x), sums = at::empty({ElementTraits::sums}, x.options().dtype(at::kFloat)).zero_();
  if (x.numel() == 0) return {grad_x, sums.sum().view(step.sizes())};
  const Tensor grad = input_grad.strides() == x.strides() ? input_grad : at::empty_like(x).copy_(input_grad);
  with_type(scalar, [&]<typename T>(T) {
    launch(lsq_gradients<T>, dim3(ElementTraits::sums), ElementTraits::threads, static_cast<const T*>(grad.const_data_ptr()),
           static_cast<const T*>(x.const_data_ptr()), x.numel(), step.const_data_ptr<float>(), zero_point.const_data_ptr<float>(),
           int(levels), static_cast<T*>(grad_x.mutable_data_ptr()), sums.mutable_data_ptr<float>());
  });
  return {grad_x, sums.sum().mul(scale).view(step.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("round_power_of_two", round_power_of_two_cuda);
  m.impl("lsq_quantize", lsq_quantize_cuda);
  m.impl("lsq_backward", lsq_backward_cuda);
}

}  // namespace quantize::weight
