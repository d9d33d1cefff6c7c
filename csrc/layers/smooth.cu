// smooth_derivative on CUDA. Build: setup.py. Specification: smooth.h.
#include "smooth.cuh"

#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../activation/group_layout.h"
#include "../core/launch.h"
#include "smooth_call.h"

namespace quantize::layers {
namespace {

at::Tensor smooth_derivative_cuda(const at::Tensor& input, c10::string_view name) {
  const Smooth function = parse_smooth(name);
  const Scalar scalar = check_scalar("smooth_derivative", "input", input.scalar_type());
  Launcher launch(input);
  const at::Tensor x = activation::packed_memory(input);
  at::Tensor y = at::empty_strided(x.sizes(), x.strides(), x.options());
  if (x.numel() == 0) return y;
  with_type(scalar, [&]<typename T>(T) {
    launch_smooth(function, static_cast<const T*>(x.const_data_ptr()), x.numel(), static_cast<T*>(y.mutable_data_ptr()), launch);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("smooth_derivative", smooth_derivative_cuda); }

}  // namespace quantize::layers
