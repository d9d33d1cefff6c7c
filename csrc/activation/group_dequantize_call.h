// The arguments of group_dequantize, the same for every backend.
#pragma once

#include <ATen/ops/empty_strided.h>

#include "group_layout.h"

namespace quantize::activation {

inline GroupLayout<int64_t> check_dequantize(const char* op, const at::Tensor& codes, const at::Tensor& ranges,
                                             const std::optional<at::Tensor>& sample_bits, int64_t bits, int64_t group_size,
                                             at::IntArrayRef size) {
  if (!sample_bits) check_bits(op, bits);
  const auto layout = group_layout<int64_t>(op, size, group_size);
  check_dtype(op, "codes", codes, at::kByte);
  check_dtype(op, "ranges", ranges, at::kShort);
  check_numel(op, "ranges", ranges, 2 * layout.total_groups());
  check_same_device(op, "ranges", ranges, codes);
  return layout;
}

// What is unpacked goes here.
inline at::Tensor empty_unpacked(const char* op, at::IntArrayRef size, at::IntArrayRef stride, at::TensorOptions options) {
  at::Tensor y = at::empty_strided(size, stride, options);
  TORCH_CHECK_VALUE(packed_strides(y.sizes(), y.strides()) == y.strides().vec(), op, ": stride must be dense with samples outermost; got ",
                    stride);
  return y;
}

}  // namespace quantize::activation
