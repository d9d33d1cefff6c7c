// fp16 and bf16 <-> fp32 on plain 16-bit words, for code that must be free of torch headers or identical on CPU and CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace quantize {

enum class Scalar { f32 = 0, f16 = 1, bf16 = 2 };

QUANTIZE_HOST_DEVICE uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

QUANTIZE_HOST_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// Element types as the kernels see them: a distinct type per format over the raw word.
struct F32 {
  float value;
  static constexpr Scalar scalar = Scalar::f32;
};
struct F16 {
  uint16_t bits;
  static constexpr Scalar scalar = Scalar::f16;
};
struct BF16 {
  uint16_t bits;
  static constexpr Scalar scalar = Scalar::bf16;
};

QUANTIZE_HOST_DEVICE float to_float(F32 x) { return x.value; }

QUANTIZE_HOST_DEVICE float to_float(BF16 x) { return bits_float(uint32_t(x.bits) << 16); }

QUANTIZE_HOST_DEVICE float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifting the exponent field alone leaves the value 2^112 too small, subnormals included; one exact product mends all.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

// Truncation toward zero; exact for values that the format holds.
QUANTIZE_HOST_DEVICE BF16 truncate_to_bf16(float x) { return {uint16_t(float_bits(x) >> 16)}; }

// A value as its neighbour toward zero in a 16-bit format, in the upper half, and how far beyond that it lies, in 2^-16 of the step to the
// next, in the lower. Adding 16 uniform bits and keeping the upper half rounds to one of the two with the mean that is the value.
QUANTIZE_HOST_DEVICE uint32_t split_number(float x, BF16) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
}

QUANTIZE_HOST_DEVICE uint32_t split_number(float x, F16) {
  const uint32_t bits = float_bits(x), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e000000u;
  if (magnitude >= 0x47800000u) return sign | 0x7c000000u;                               // beyond the format: infinite
  if (magnitude < 0x38800000u) return sign | uint32_t(bits_float(magnitude) * 0x1p40f);  // the step is 2^-24 below 2^-14
  return sign | (magnitude - 0x38000000u) << 3;
}

// To nearest, ties to even.
QUANTIZE_HOST_DEVICE BF16 round_nearest(float x, BF16) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

QUANTIZE_HOST_DEVICE F16 round_nearest(float x, F16) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(0x7e00)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u)  // adding 1/2 leaves the subnormal's units at the end of the mantissa, rounded by the addition itself
    return {uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

QUANTIZE_HOST_DEVICE F32 round_nearest(float x, F32) { return {x}; }

}  // namespace quantize
