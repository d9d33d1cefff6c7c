// Division by a number that the host knows: one high product, an addition and a shift (Granlund and Montgomery, PLDI 1994, figure 4.1).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace quantize {

struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {  // 1 <= d < 2^31
    while ((uint64_t(1) << shift) < d) ++shift;
    magic = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d) / d + 1);
  }

  QUANTIZE_HOST_DEVICE uint32_t quotient(uint32_t n) const {  // n < 2^31
#ifdef __CUDA_ARCH__
    return (__umulhi(n, magic) + n) >> shift;
#else
    return (uint32_t(uint64_t(n) * magic >> 32) + n) >> shift;
#endif
  }
};

}  // namespace quantize
