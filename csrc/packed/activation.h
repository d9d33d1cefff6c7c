// The grid of a packed layer's inputs, as numbers: for the CPU, which may look at them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "../weight/lsq.h"
#include "packed_call.h"

namespace quantize::packed {

inline constexpr int64_t fewest_tile_rows = 8;  // fewer leave more than half of a tile empty

struct Activation {
  weight::LsqRange range;
  int zero_point;
};

inline Activation activation(const char* op, const at::Tensor& x, const at::Tensor& step, const at::Tensor& zero_point, int64_t bits) {
  check_activation(op, x, step, zero_point, bits);
  const float zero = *zero_point.const_data_ptr<float>();
  TORCH_CHECK_VALUE(zero >= 0 && zero < float(1 << bits) && zero == std::nearbyint(zero), op,
                    ": zero_point must be a whole number below 2^activation_bits; got ", zero);
  return {weight::lsq_range(*step.const_data_ptr<float>(), zero, (1 << bits) - 1), int(zero)};
}

}  // namespace quantize::packed
