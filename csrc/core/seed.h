// The argument `seed` of ops that draw random numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "philox.h"

namespace quantize {

inline Seed read_seed(const char* op, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(seed.device().is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 2 && seed.is_contiguous(), op,
                    ": seed must be an int64 CPU tensor (seed, offset); got ", seed.scalar_type(), " ", seed.sizes(), " on ",
                    seed.device());
  const int64_t* values = seed.const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[1])};
}

}  // namespace quantize
