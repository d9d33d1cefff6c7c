// sign_quantize, unit_quantize and grid_backward on CUDA. Build: setup.py. Specification: fixed_grid.h; arguments: fixed_grid_call.h.
#include "fixed_grid.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "fixed_grid_call.h"

namespace quantize::weight {
namespace {

using activation::packed_memory;
using at::Tensor;

std::tuple<Tensor, Tensor> results(const Tensor& x, bool polynomial) {
  return {at::empty_strided(x.sizes(), x.strides(), x.options()),
          at::empty({slope_bytes(x.numel(), polynomial)}, x.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor> sign_quantize_cuda(const Tensor& input, bool polynomial) {
  const Scalar scalar = check_scalar("sign_quantize", "x", input.scalar_type());
  Launcher launch(input);
  const Tensor x = packed_memory(input);
  auto [y, kept] = results(x, polynomial);
  if (x.numel() == 0) return {y, kept};
  with_type(scalar, [&, &y = y, &kept = kept]<typename T>(T) {
    launch_sign(static_cast<const T*>(x.const_data_ptr()), x.numel(), polynomial, static_cast<T*>(y.mutable_data_ptr()),
                kept.mutable_data_ptr<uint8_t>(), launch);
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor> unit_quantize_cuda(const Tensor& input, int64_t levels) {
  const Scalar scalar = check_unit(input, levels);
  Launcher launch(input);
  const Tensor x = packed_memory(input);
  auto [y, kept] = results(x, false);
  if (x.numel() == 0) return {y, kept};
  with_type(scalar, [&, &y = y, &kept = kept]<typename T>(T) {
    launch_unit(static_cast<const T*>(x.const_data_ptr()), x.numel(), int(levels), static_cast<T*>(y.mutable_data_ptr()),
                kept.mutable_data_ptr<uint8_t>(), launch);
  });
  return {y, kept};
}

Tensor grid_backward_cuda(const Tensor& input, const Tensor& kept, bool polynomial) {
  const Scalar scalar = check_grid_backward(input, kept, polynomial);
  Launcher launch(input);
  const Tensor grad = packed_memory(input), bits = kept.contiguous();
  Tensor out = at::empty_strided(grad.sizes(), grad.strides(), grad.options());
  if (grad.numel() == 0) return out;
  with_type(scalar, [&]<typename T>(T) {
    launch_grid_gradients(static_cast<const T*>(grad.const_data_ptr()), bits.const_data_ptr<uint8_t>(), grad.numel(), polynomial,
                          static_cast<T*>(out.mutable_data_ptr()), launch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("sign_quantize", sign_quantize_cuda);
  m.impl("unit_quantize", unit_quantize_cuda);
  m.impl("grid_backward", grid_backward_cuda);
}

}  // namespace quantize::weight
