// pack_pool_indices and unpack_pool_indices on CUDA. Build: setup.py. Specification: pool_indices.h; arguments: pool_indices.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../core/grid.h"
#include "../core/launch.h"
#include "pool_window.h"

namespace quantize::activation {
namespace {

using at::IntArrayRef;
using at::Tensor;

struct PoolTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
};

// indices: int64 [n], flat in the input plane. offsets: uint8 [n], position in the window. Output planes follow each other in both.
__global__ void __launch_bounds__(PoolTraits::threads)
    pack_kernel(PoolWindow window, int64_t n, const int64_t* __restrict__ indices, uint8_t* __restrict__ offsets) {
  const int64_t plane = window.plane(), step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) offsets[i] = window.pack(i % plane, indices[i]);
}

__global__ void __launch_bounds__(PoolTraits::threads)
    unpack_kernel(PoolWindow window, int64_t n, const uint8_t* __restrict__ offsets, int64_t* __restrict__ indices) {
  const int64_t plane = window.plane(), step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) indices[i] = window.unpack(i % plane, offsets[i]);
}

// Source and Target: the element types of `input` and of the result.
template <typename Source, typename Target>
Tensor convert(const char* op, const Tensor& input, at::ScalarType type, const PoolWindow& window,
               void (*kernel)(PoolWindow, int64_t, const Source*, Target*)) {
  Launcher launch(input);
  const Tensor source = input.contiguous();
  Tensor target = at::empty(source.sizes(), source.options().dtype(type));
  const int64_t n = source.numel();
  if (n == 0) return target;
  const dim3 grid(unsigned(grid_size(launch.processors(), PoolTraits::blocks, n, PoolTraits::threads)));
  launch(kernel, grid, PoolTraits::threads, window, n, source.const_data_ptr<Source>(), target.mutable_data_ptr<Target>());
  return target;
}

Tensor pack_pool_indices_cuda(const Tensor& indices, IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation) {
  const char* op = "pack_pool_indices";
  check_dtype(op, "indices", indices, at::kLong);
  return convert(op, indices, at::kByte, read_pool_window(op, indices, input_size, kernel, stride, padding, dilation), pack_kernel);
}

Tensor unpack_pool_indices_cuda(const Tensor& offsets, IntArrayRef input_size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                IntArrayRef dilation) {
  const char* op = "unpack_pool_indices";
  check_dtype(op, "offsets", offsets, at::kByte);
  return convert(op, offsets, at::kLong, read_pool_window(op, offsets, input_size, kernel, stride, padding, dilation), unpack_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("pack_pool_indices", pack_pool_indices_cuda);
  m.impl("unpack_pool_indices", unpack_pool_indices_cuda);
}

}  // namespace quantize::activation
