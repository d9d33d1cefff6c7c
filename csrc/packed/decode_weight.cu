// The packed room on CUDA: weights are decoded, and cuDNN and cuBLAS multiply. Build: setup.py. Arguments: decode_weight.h, packed_call.h.
//
// Activations and levels go in as whole numbers, at most 255 and 128, which TF32 holds exactly as it does their products' fp32 sums: where
// TF32 is allowed the tensor cores return the CPU's integers (up to 2^24). Under autocast too: its half precision has no room for the sums.
#include "decode_weight.h"

#include <ATen/ops/add.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../core/grid.h"
#include "../core/launch.h"
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

// Codes less their zero point, as floats: the quantized input in units of its step.
Tensor whole_input(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t bits) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantize::lsq_quantize", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>();
  return op.call(x, step, zero_point, (1 << bits) - 1).div(step).round();
}

Tensor scaled(const Tensor& sums, const Tensor& step, const Tensor& scales, const OptionalTensor& bias, int64_t trailing) {
  std::vector<int64_t> shape(trailing, 1);
  shape.insert(shape.begin(), scales.numel());
  Tensor out = sums.mul(scales.mul(step).view(shape));
  return bias && bias->defined() ? out.add_(bias->view(shape)) : out;
}

Tensor packed_conv2d_cuda(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                          const Tensor&, const Tensor& levels, const Tensor& scales, const Tensor&, const OptionalTensor& bias,
                          int64_t storage_bits, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          int64_t groups, const OptionalTensor& residual, std::optional<double> low, std::optional<double> high,
                          const OptionalTensor&, const OptionalTensor&, int64_t next_bits) {
  const char* op = "packed_conv2d";
  const auto g = check_images(op, x, scales, kernel, stride, padding, dilation, groups);
  const int64_t inputs = g.channels / groups;
  check_activation(op, x, step, zero_point, activation_bits);
  check_weight(op, x, codes, levels, scales, bias, inputs * kernel[0] * kernel[1], storage_bits);
  const ExcludeDispatchKeyGuard exact(c10::DispatchKey::AutocastCUDA);
  const Tensor rows = decode_weight_cuda(codes, levels, at::ones_like(scales), storage_bits, inputs * kernel[0] * kernel[1]);
  const Tensor weight = rows.view({scales.numel(), kernel[0], kernel[1], inputs}).permute({0, 3, 1, 2});
  TORCH_CHECK_VALUE(next_bits == 0, op, ": next_bits must be 0 on CUDA; got ", next_bits);
  const Tensor sums = at::conv2d(whole_input(x, step, zero_point, activation_bits), weight, {}, stride, padding, dilation, groups);
  Tensor out = scaled(sums, step, scales, bias, 2);
  if (residual && residual->defined()) out = at::add(out, *residual);
  if (low) out.clamp_min_(*low);
  if (high) out.clamp_max_(*high);
  return out;
}

Tensor packed_linear_cuda(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                          const Tensor&, const Tensor& levels, const Tensor& scales, const Tensor&, const OptionalTensor& bias,
                          int64_t storage_bits) {
  const char* op = "packed_linear";
  check_rows(op, x);
  check_activation(op, x, step, zero_point, activation_bits);
  check_weight(op, x, codes, levels, scales, bias, x.size(1), storage_bits);
  const ExcludeDispatchKeyGuard exact(c10::DispatchKey::AutocastCUDA);
  const Tensor weight = decode_weight_cuda(codes, levels, at::ones_like(scales), storage_bits, x.size(1));
  return scaled(at::linear(whole_input(x, step, zero_point, activation_bits), weight), step, scales, bias, 0);
}

Tensor packed_linear_float_cuda(const Tensor& x, const Tensor& codes, const Tensor&, const Tensor& levels, const Tensor& scales,
                                const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear_float";
  check_rows(op, x);
  check_weight(op, x, codes, levels, scales, bias, x.size(1), storage_bits);
  const ExcludeDispatchKeyGuard exact(c10::DispatchKey::AutocastCUDA);
  return at::linear(x, decode_weight_cuda(codes, levels, scales, storage_bits, x.size(1)), bias);
}

// cuDNN has minimal filtering of its own.
Tensor stem_conv2d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& panels, IntArrayRef stride,
                        IntArrayRef padding) {
  stem_call::sizes<int64_t>(x.sizes(), weight, stride, padding);
  stem_call::check(x, weight, bias, panels);
  return at::conv2d(x, weight, bias, stride, padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("stem_conv2d", stem_conv2d_cuda);
  m.impl("decode_weight", decode_weight_cuda);
  m.impl("packed_conv2d", packed_conv2d_cuda);
  m.impl("packed_linear", packed_linear_cuda);
  m.impl("packed_linear_float", packed_linear_float_cuda);
}

}  // namespace quantize::packed
