// Powers of two by a polynomial: the same float32 operations in the same order on the CPU, in its vectors (exp2_lanes.h) and on CUDA.
#pragma once

#include "half.h"

namespace quantize {

// 2^x to about one unit in the last place, exact for whole x; -126 < x < 127.
QUANTIZE_HOST_DEVICE float exp2_near(float x) {
  const float whole = (x + 12582912.f) - 12582912.f, f = x - whole;  // 1.5 * 2^23: to nearest
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f, p = p * f + 9.6181291e-3f, p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f, p = p * f + 6.9314718e-1f, p = p * f + 1.f;
  return bits_float(float_bits(p) + (uint32_t(int32_t(whole)) << 23));
}

}  // namespace quantize
