// The arguments of decode_weight.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/checks.h"
#include "row_codes.h"

namespace quantize::packed {

inline void check_decode(const at::Tensor& codes, const at::Tensor& levels, const at::Tensor& scales, int64_t bits, int64_t columns) {
  const char* op = "decode_weight";
  TORCH_CHECK_VALUE(bits == 1 || bits == 2 || bits == 4 || bits == 8 || bits == 16, op, ": storage_bits must be 1, 2, 4, 8 or 16; got ",
                    bits);
  check_dtype(op, "codes", codes, at::kByte);
  check_dtype(op, "levels", levels, at::kFloat);
  check_dtype(op, "scales", scales, at::kFloat);
  check_numel(op, "levels", levels, int64_t(1) << bits);
  TORCH_CHECK_VALUE(codes.dim() == 2 && columns >= 0 && codes.size(1) * 8 >= columns * bits && scales.numel() == codes.size(0), op,
                    ": codes must be [channels, bytes] with a scale for each channel and ", columns, " codes in a row; got ", codes.sizes(),
                    " and ", scales.sizes());
}

}  // namespace quantize::packed
