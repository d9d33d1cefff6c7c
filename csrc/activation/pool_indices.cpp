// pack_pool_indices and unpack_pool_indices: CPU and Meta.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "pool_window.h"

namespace quantize::activation {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t grain = 16384;

Tensor pack_pool_indices_cpu(const Tensor& input, IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                             IntArrayRef dilation) {
  check_dtype("pack_pool_indices", "indices", input, at::kLong);
  const PoolWindow window = read_pool_window("pack_pool_indices", input, input_size, kernel, stride, padding, dilation);
  const Tensor indices = input.contiguous();
  Tensor offsets = at::empty(indices.sizes(), indices.options().dtype(at::kByte));
  const auto* source = indices.const_data_ptr<int64_t>();
  auto* target = offsets.data_ptr<uint8_t>();
  at::parallel_for(0, indices.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = window.pack(i % window.plane(), source[i]);
  });
  return offsets;
}

Tensor unpack_pool_indices_cpu(const Tensor& input, IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                               IntArrayRef dilation) {
  check_dtype("unpack_pool_indices", "offsets", input, at::kByte);
  const PoolWindow window = read_pool_window("unpack_pool_indices", input, input_size, kernel, stride, padding, dilation);
  const Tensor offsets = input.contiguous();
  Tensor indices = at::empty(offsets.sizes(), offsets.options().dtype(at::kLong));
  const auto* source = offsets.const_data_ptr<uint8_t>();
  auto* target = indices.data_ptr<int64_t>();
  at::parallel_for(0, offsets.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = window.unpack(i % window.plane(), source[i]);
  });
  return indices;
}

Tensor pack_pool_indices_meta(const Tensor& x, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef) {
  return at::empty_symint(x.sym_sizes(), x.options().dtype(at::kByte));
}

Tensor unpack_pool_indices_meta(const Tensor& x, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef) {
  return at::empty_symint(x.sym_sizes(), x.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("pack_pool_indices", pack_pool_indices_cpu);
  m.impl("unpack_pool_indices", unpack_pool_indices_cpu);
}

TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("pack_pool_indices", pack_pool_indices_meta);
  m.impl("unpack_pool_indices", unpack_pool_indices_meta);
}

}  // namespace quantize::activation
