// clipped_noise and its gradient on CUDA. Build: setup.py. Arguments: clipped_noise.h.
#include "clipped_noise.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "clipped_noise.h"

namespace quantize::weight {
namespace {

using at::Tensor;

DiffQTensor tensor_of(const Tensor& x, const Tensor& seed) {
  DiffQTensor t{};
  t.n = x.numel(), t.seed = read_seed("clipped_noise", seed);
  return t;
}

dim3 grid_of_pieces(const Launcher& launch, int64_t n) { return dim3(unsigned(grid_size(launch.processors(), 8, n, DiffQTraits::piece))); }

Tensor clipped_noise_cuda(const Tensor& input, const Tensor& ends, const Tensor& seed) {
  const Scalar scalar = check_clipped(input, ends);
  Launcher launch(input);
  const Tensor x = input.contiguous(), own_ends = ends.contiguous();
  Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  with_type(scalar, [&]<typename T>(T) {
    launch(clip_with_noise_on_device<T>, grid_of_pieces(launch, x.numel()), DiffQDeviceTraits::threads, tensor_of(x, seed),
           static_cast<const T*>(x.const_data_ptr()), own_ends.const_data_ptr<float>(), static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

std::tuple<Tensor, Tensor> clipped_noise_backward_cuda(const Tensor& input_grad, const Tensor& input, const Tensor& ends,
                                                       const Tensor& seed) {
  const Scalar scalar = check_clipped_backward(input_grad, input, ends);
  Launcher launch(input);
  const Tensor grad = input_grad.contiguous(), x = input.contiguous(), own_ends = ends.contiguous();
  const int64_t pieces = (x.numel() + DiffQTraits::piece - 1) / DiffQTraits::piece;
  Tensor grad_x = at::empty_like(x), sums = at::empty({pieces, 3}, ends.options());
  if (x.numel() == 0) return {grad_x, sums.sum(0)};
  with_type(scalar, [&]<typename T>(T) {
    launch(clip_gradients_on_device<T>, grid_of_pieces(launch, x.numel()), DiffQDeviceTraits::threads, tensor_of(x, seed),
           static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()), own_ends.const_data_ptr<float>(),
           static_cast<T*>(grad_x.mutable_data_ptr()), sums.mutable_data_ptr<float>());
  });
  return {grad_x, sums.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("clipped_noise", clipped_noise_cuda);
  m.impl("clipped_noise_backward", clipped_noise_backward_cuda);
}

}  // namespace quantize::weight
