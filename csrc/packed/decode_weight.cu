// What multiplies floats on CUDA: weights are decoded and cuBLAS multiplies, or a few rows go through the codes; cuDNN has the stems.
// Build: setup.py. Arguments: decode_weight.h, packed_call.h, stem_call.h.
#include "decode_weight.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../core/grid.h"
#include "../core/launch.h"
#include "float_rows.cuh"
#include "packed_call.h"
#include "stem_call.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::impl::ExcludeDispatchKeyGuard;
using OptionalTensor = std::optional<Tensor>;

struct DecodeTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
};

// codes: [rows, bytes]. levels: [2^bits], bits 1, 2, 4, 8 or 16. out: [rows, columns].
__global__ void __launch_bounds__(DecodeTraits::threads)
    decode_rows(const uint8_t* __restrict__ codes, const float* __restrict__ levels, const float* __restrict__ scales, int64_t rows,
                int64_t bytes, int64_t columns, int bits, float* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * columns; i += step)
    out[i] = scales[i / columns] * levels[code_at(codes + i / columns * bytes, i % columns, bits)];
}

Tensor decode_weight_cuda(const Tensor& code_tensor, const Tensor& level_tensor, const Tensor& scale_tensor, int64_t bits,
                          int64_t columns) {
  check_decode(code_tensor, level_tensor, scale_tensor, bits, columns);
  check_same_device("decode_weight", "levels", level_tensor, code_tensor);
  check_same_device("decode_weight", "scales", scale_tensor, code_tensor);
  Launcher launch(code_tensor);
  const Tensor codes = code_tensor.contiguous(), levels = level_tensor.contiguous(), scales = scale_tensor.contiguous();
  Tensor out = at::empty({codes.size(0), columns}, scales.options());
  if (out.numel() == 0) return out;
  const auto grid = grid_size(launch.processors(), DecodeTraits::blocks, out.numel(), DecodeTraits::threads);
  launch(decode_rows, dim3(unsigned(grid)), DecodeTraits::threads, codes.const_data_ptr<uint8_t>(), levels.const_data_ptr<float>(),
         scales.const_data_ptr<float>(), codes.size(0), codes.size(1), columns, int(bits), out.mutable_data_ptr<float>());
  return out;
}

Tensor packed_linear_float_cuda(const Tensor& x, const Tensor& codes, const Tensor&, const Tensor& levels, const Tensor& scales,
                                const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear_float";
  check_rows(op, x);
  check_weight(op, x, codes, levels, scales, bias, x.size(1), storage_bits);
  const int64_t rows = x.size(0), columns = x.size(1), out_channels = scales.numel();
  if (rows > FloatRows::most_rows || std::min({rows, columns, out_channels}) == 0) {
    const ExcludeDispatchKeyGuard exact(c10::DispatchKey::AutocastCUDA);
    return at::linear(x, decode_weight_cuda(codes, levels, scales, storage_bits, columns), bias);
  }
  Launcher launch(x);
  const Tensor dense = x.contiguous(), own = aligned_bytes(codes);
  Tensor out = at::empty({rows, out_channels}, x.options());
  FloatRowsCall c{};
  c.x = dense.const_data_ptr<float>(), c.codes = own.const_data_ptr<uint8_t>();
  c.rows = int(rows), c.columns = size_on_device(op, "x's channels", columns);
  c.out_channels = size_on_device(op, "scales' length", out_channels);
  c.levels = levels.const_data_ptr<float>(), c.scales = scales.const_data_ptr<float>();
  c.bias = bias && bias->defined() ? bias->const_data_ptr<float>() : nullptr;
  c.out = out.mutable_data_ptr<float>();
  launch_float_rows(c, int(storage_bits), own.size(1), launch);
  return out;
}

// cuDNN has minimal filtering of its own.
Tensor stem_conv2d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& panels, IntArrayRef stride,
                        IntArrayRef padding, std::optional<double> low, std::optional<double> high, IntArrayRef window,
                        IntArrayRef window_stride, IntArrayRef window_padding) {
  stem_call::sizes<int64_t>(x.sizes(), weight, stride, padding);
  stem_call::check(x, weight, bias, panels);
  return stem_call::plain(x, weight, bias, stride, padding, low, high, {window, window_stride, window_padding});
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("stem_conv2d", stem_conv2d_cuda);
  m.impl("decode_weight", decode_weight_cuda);
  m.impl("packed_linear_float", packed_linear_float_cuda);
}

}  // namespace quantize::packed
