// Rounding to a power of two in integer arithmetic on the float's bits, so that no logarithm decides a tie.
//
// PO2 rounds the exponent: 2^k below sqrt(2) 2^k, which no float equals. PO2+ rounds sqrt(8/9)|x|, whose threshold is 1.5 * 2^k: the
// nearest power of two, ties downward (1.5 -> 1, 0.75 -> 0.5).
#pragma once

#include "../core/half.h"

namespace quantize::weight {

template <typename Bits, int mantissa_bits>
struct PowerOfTwoFormat {
  static constexpr int mantissa = mantissa_bits;
  static constexpr Bits one = 1, sign = one << (8 * sizeof(Bits) - 1), implicit = one << mantissa_bits, infinity = ~sign & ~(implicit - 1),
                        largest = infinity - implicit;  // the largest power of two
};

struct Float32Format : PowerOfTwoFormat<uint32_t, 23> {
  static constexpr uint32_t sqrt2 = 0x3504f3u;  // the mantissa of the largest number below it
};

struct Float64Format : PowerOfTwoFormat<uint64_t, 52> {
  static constexpr uint64_t sqrt2 = 0x6a09e667f3bccull;
};

// What is added to a positive float's bits so that clearing the mantissa rounds it.
template <typename Format>
QUANTIZE_HOST_DEVICE constexpr auto power_of_two_carry(bool plus) {
  return Format::implicit - 1 - (plus ? Format::implicit / 2 : Format::sqrt2);
}

// Zeros, infinities and NaN stay what they are; beyond the largest power of two of the format, that one.
template <typename Format, typename Bits>
QUANTIZE_HOST_DEVICE Bits round_power_of_two_bits(Bits x, bool plus) {
  const Bits sign = x & Format::sign, magnitude = x & ~Format::sign;
  if (magnitude == 0 || magnitude >= Format::infinity) return x;
  if (magnitude < Format::implicit) {  // subnormal: its leading bit moves up to where a normal number's is implied, and back
    int shift = 0;
    Bits normal = magnitude;
    while (!(normal & Format::implicit)) normal <<= 1, ++shift;
    const Bits fraction = normal & (Format::implicit - 1);
    const bool up = fraction > (plus ? Format::implicit / 2 : Format::sqrt2);
    return sign | (up ? (Format::implicit << 1) >> shift : Format::implicit >> shift);
  }
  const Bits rounded = (magnitude + power_of_two_carry<Format>(plus)) & Format::infinity;
  return sign | (rounded > Format::largest ? Format::largest : rounded);
}

QUANTIZE_HOST_DEVICE float round_power_of_two(float x, bool plus) {
  return bits_float(round_power_of_two_bits<Float32Format>(float_bits(x), plus));
}

// fp16 and bf16 values are fp32 values, but fp16 ends at 2^15.
QUANTIZE_HOST_DEVICE F32 round_power_of_two(F32 x, bool plus) { return {round_power_of_two(x.value, plus)}; }

QUANTIZE_HOST_DEVICE BF16 round_power_of_two(BF16 x, bool plus) { return truncate_to_bf16(round_power_of_two(to_float(x), plus)); }

QUANTIZE_HOST_DEVICE F16 round_power_of_two(F16 x, bool plus) {
  if ((x.bits & 0x7fffu) >= 0x7c00u) return x;
  const float y = round_power_of_two(to_float(x), plus);
  return round_nearest(y > 32768.f ? 32768.f : y < -32768.f ? -32768.f : y, F16{});
}

}  // namespace quantize::weight
