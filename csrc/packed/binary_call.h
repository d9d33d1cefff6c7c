// Arguments of the binary ops, checked: the same on every backend. What they mean: binary_bits.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/checks.h"
#include "conv_geometry.h"

namespace quantize::packed::binary_call {

inline constexpr const char *conv_floats = "[N, C, H, W]", *conv_bits = "[N, H, W, bytes]";
inline constexpr const char *linear_floats = "[N, C]", *linear_bits = "[N, bytes]";

inline int64_t bits_bytes(int64_t count) { return (count + 63) / 64 * 8; }
inline bool given(const std::optional<at::Tensor>& tensor) { return tensor && tensor->defined(); }

// A contiguous tensor of this type and size, or null where an optional one is absent.
template <typename T>
const T* values(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
  check_dtype(op, name, tensor, dtype);
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.is_contiguous(), op, ": ", name, " must be contiguous ", sizes, "; got ",
                    tensor.sizes(), tensor.is_contiguous() ? "" : " with gaps");
  return tensor.const_data_ptr<T>();
}
template <typename T>
const T* values(const char* op, const char* name, const std::optional<at::Tensor>& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
  return given(tensor) ? values<T>(op, name, *tensor, dtype, sizes) : nullptr;
}

inline void check_input(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& threshold,
                        const std::optional<at::Tensor>& flip, int64_t channels, const char* floats, const char* bits, int64_t dims) {
  TORCH_CHECK_VALUE(channels > 0, op, ": channels must be positive; got ", channels);
  if (x.scalar_type() == at::kByte) {
    TORCH_CHECK_VALUE(x.dim() == dims && x.sym_size(dims - 1) == bits_bytes(channels), op, ": x must be ", bits, ", ", bits_bytes(channels),
                      " bytes for ", channels, " channels; got ", x.sym_sizes());
    TORCH_CHECK_VALUE(!given(threshold) && !given(flip), op, ": threshold and flip must be None where x is bits");
    return;
  }
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op, ": x must be Float, or Byte for bits; got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == dims && x.sym_size(1) == channels, op, ": x must be ", floats, " of ", channels, " channels; got ",
                    x.sym_sizes());
}

// Int: c10::SymInt in Meta kernels.
template <typename Int>
Geometry<Int> conv_sizes(const char* op, c10::ArrayRef<Int> x, bool bits, const Int& out_channels, int64_t channels, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  if (!bits) return geometry<Int>(op, x, out_channels, kernel, stride, padding, dilation, groups);
  const Int sizes[4] = {x[0], channels, x[1], x[2]};
  return geometry<Int>(op, sizes, out_channels, kernel, stride, padding, dilation, groups);
}

// What can be added to an output of these sizes while it is written, as that lies; otherwise undefined, and left for a sum of its own.
inline at::Tensor residual_like(const char* op, const std::optional<at::Tensor>& residual, const at::Tensor& x, at::IntArrayRef sizes,
                                bool bits_out, at::MemoryFormat format) {
  if (!given(residual)) return {};
  TORCH_CHECK_VALUE(!bits_out, op, ": residual must be None where bits go out");
  check_same_device(op, "residual", *residual, x);
  return residual->scalar_type() == at::kFloat && residual->sizes() == sizes ? residual->contiguous(format) : at::Tensor();
}

// Whether floats go out as [N, H, W, C], as they came.
inline bool channels_last(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat && x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

// Bits do not tell: what is added to the output does.
inline bool channels_last(const at::Tensor& x, const std::optional<at::Tensor>& residual) {
  return channels_last(x.scalar_type() == at::kByte && given(residual) ? *residual : x);
}

}  // namespace quantize::packed::binary_call
