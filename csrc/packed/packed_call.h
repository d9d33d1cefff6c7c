// The arguments of packed_conv2d, packed_linear and packed_linear_float, the same for every backend. A GPU multiplies the levels of
// `codes`, the CPU those of panels, which panels.h checks; what single numbers are nobody asks on a GPU, as that would wait for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

#include "../core/checks.h"
#include "conv_geometry.h"

namespace quantize::packed {

// An array of floats.
inline void check_floats(const char* op, const char* argument, const at::Tensor& tensor, int64_t n) {
  check_dtype(op, argument, tensor, at::kFloat);
  check_numel(op, argument, tensor, n);
  check_contiguous(op, argument, tensor);
}

// step and zero_point of inputs of so many bits.
inline void check_activation(const char* op, const at::Tensor& x, const at::Tensor& step, const at::Tensor& zero_point, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, op, ": activation_bits must be between 1 and 8; got ", bits);
  for (const auto& [name, tensor] : {std::pair{"step", step}, std::pair{"zero_point", zero_point}}) {
    check_dtype(op, name, tensor, at::kFloat);
    check_numel(op, name, tensor, 1);
    check_same_device(op, name, tensor, x);
  }
}

// codes: a row of `length` levels an output channel (quantize/packed/layout.py). levels: [2^bits]. scales: of the output channels.
inline void check_weight(const char* op, const at::Tensor& x, const at::Tensor& codes, const at::Tensor& levels, const at::Tensor& scales,
                         const std::optional<at::Tensor>& bias, int64_t length, int64_t bits) {
  TORCH_CHECK_VALUE(bits == 2 || bits == 4 || bits == 8, op, ": storage_bits must be 2, 4 or 8; got ", bits);
  check_floats(op, "levels", levels, int64_t(1) << bits);
  check_floats(op, "scales", scales, scales.numel());
  check_dtype(op, "codes", codes, at::kByte);
  const int64_t channels = scales.numel(), bytes = (length * bits + 63) / 64 * 8;
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.size(0) == channels && codes.size(1) == bytes, op, ": codes must be [", channels, ", ", bytes,
                    "], for ", length, " levels of ", bits, " bits; got ", codes.sizes());
  for (const auto& [name, tensor] : {std::pair{"codes", codes}, std::pair{"levels", levels}, std::pair{"scales", scales}})
    check_same_device(op, name, tensor, x);
  if (!bias || !bias->defined()) return;
  check_floats(op, "bias", *bias, channels);
  check_same_device(op, "bias", *bias, x);
}

inline void check_rows(const char* op, const at::Tensor& x) {
  check_dtype(op, "x", x, at::kFloat);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [N, C]; got ", x.sizes());
}

inline Geometry<int64_t> check_images(const char* op, const at::Tensor& x, const at::Tensor& scales, at::IntArrayRef kernel,
                                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                      bool codes = false) {
  check_dtype(op, "x", x, codes ? at::kByte : at::kFloat);
  return geometry<int64_t>(op, x.sizes(), scales.numel(), kernel, stride, padding, dilation, groups);
}

}  // namespace quantize::packed
