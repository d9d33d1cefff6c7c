// channel_quantize and clip_gradient on CUDA. Build: setup.py. Specification: channel_quantize.h; arguments: channel_quantize_call.h.
#include "channel_quantize.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "channel_quantize_call.h"

namespace quantize::weight {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> channel_quantize_cuda(const Tensor& input, c10::string_view name, int64_t bits, bool least_squares) {
  const Scalar scalar = check_scalar("channel_quantize", "w", input.scalar_type());
  const Codebook book = codebook("channel_quantize", {name.data(), name.size()}, bits, least_squares);
  const ChannelLayout layout(input);
  Launcher launch(input);
  const Tensor w = channel_memory(input);
  Tensor y = at::empty_strided(w.sizes(), w.strides(), w.options());
  Tensor scale = at::empty({layout.channels}, w.options().dtype(at::kFloat)), limit = at::empty_like(scale);
  if (layout.channels == 0) return {y, scale, limit};
  with_type(scalar, [&]<typename T>(T) {
    launch_quantize_channels(static_cast<const T*>(w.const_data_ptr()), layout.channels, layout.elements, book,
                             static_cast<T*>(y.mutable_data_ptr()), scale.mutable_data_ptr<float>(), limit.mutable_data_ptr<float>(),
                             launch);
  });
  return {y, scale, limit};
}

Tensor clip_gradient_cuda(const Tensor& input_grad, const Tensor& input, const Tensor& limit) {
  const Scalar scalar = check_clip_gradient(input_grad, input, limit);
  const ChannelLayout layout(input);
  Launcher launch(input);
  const Tensor w = channel_memory(input), limits = limit.contiguous();
  Tensor out = at::empty_strided(w.sizes(), w.strides(), w.options());
  if (out.numel() == 0) return out;
  const Tensor grad = input_grad.strides() == w.strides() ? input_grad : at::empty_like(out).copy_(input_grad);
  with_type(scalar, [&]<typename T>(T) {
    launch_clip_channels(static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(w.const_data_ptr()),
                         limits.const_data_ptr<float>(), layout.channels, layout.elements, static_cast<T*>(out.mutable_data_ptr()), launch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("channel_quantize", channel_quantize_cuda);
  m.impl("clip_gradient", clip_gradient_cuda);
}

}  // namespace quantize::weight
