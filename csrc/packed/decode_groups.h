// Arguments of unpack_groups and decode_groups.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/checks.h"
#include "group_codes.h"

namespace quantize::packed {

// The number of groups.
inline int64_t check_groups(const char* op, const at::Tensor& group_bits, int64_t numel, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size > 0, op, ": group_size must be positive; got ", group_size);
  check_dtype(op, "group_bits", group_bits, at::kByte);
  const int64_t groups = numel / group_size + (numel % group_size != 0);
  check_numel(op, "group_bits", group_bits, groups / 2 + groups % 2);
  return groups;
}

inline int64_t check_unpack(const at::Tensor& codes, const at::Tensor& group_bits, int64_t group_size, int64_t numel, int64_t width) {
  const char* op = "unpack_groups";
  TORCH_CHECK_VALUE(width == 8 || width == 16, op, ": width must be 8 or 16; got ", width);
  TORCH_CHECK_VALUE(numel >= 0, op, ": numel must not be negative; got ", numel);
  check_dtype(op, "codes", codes, at::kByte);
  return check_groups(op, group_bits, numel, group_size);
}

inline void check_decode_groups(const at::Tensor& values, const at::Tensor& group_bits, const at::Tensor& scales, int64_t group_size,
                                int64_t span) {
  const char* op = "decode_groups";
  TORCH_CHECK_TYPE(values.scalar_type() == at::kByte || values.scalar_type() == at::kShort, op, ": values must be uint8 or int16; got ",
                   values.scalar_type());
  check_dtype(op, "scales", scales, at::kFloat);
  TORCH_CHECK_VALUE(span > 0, op, ": span must be positive; got ", span);
  const int64_t numel = values.numel();
  check_groups(op, group_bits, numel, group_size);
  TORCH_CHECK_VALUE(scales.dim() == 2 && scales.size(1) == 2 && scales.size(0) == numel / span + (numel % span != 0), op,
                    ": scales must be [rows, 2], a row for every ", span, " of ", numel, " values; got ", scales.sizes());
}

}  // namespace quantize::packed
