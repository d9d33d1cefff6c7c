// The packed format of a group of activations and the arithmetic that makes it: the specification for every backend.
//
// A sample's elements, in memory order, are cut into groups of `group_size` (the last may be short). A group of n elements at b bits is
// ceil(n*b/8) bytes of codes and two 16-bit words of range. B = 2^b - 1, and an element decodes to min + code*scale.
//
//   range    fp32 input: bf16 min rounded down, bf16 scale rounded up. fp16/bf16 input: min and max in the input's own type, exact.
//            Both are rounded before the codes are drawn, so E[decoded] = x (ActNN, arXiv 2104.14129, rounds after and is biased), but
//            where max - min is beyond float32: then values above min + B*scale become that.
//   codes    whole blocks of 256/b elements are 16 little-endian words of 16 bits: word w holds the elements
//            w/2 + 8*(w%2) + 16*j, j = 0..16/b-1, the j-th at bit b*j. What is left after the last whole block is packed in order,
//            element i at bit b*i. (Words interleave as two 8-lane vectors of 32 bits do, so no lane is ever moved.)
//   noise    code = floor((x - min)/scale + u). Element e of group g takes 16 bits of Philox(counter = (8*(e/128) + e%8, g)): with
//            j = e%128/16, word j%4, half e%16/8, byte-swapped where j >= 4. A draw serves twice, 64 elements apart; each is exactly
//            uniform, and the pair's correlation of 1/128 adds 0.6 % to the variance of a group's sum.
#pragma once

#include <cstdint>

#include "../core/half.h"
#include "../core/philox.h"

namespace quantize::activation {

struct GroupTraits {
  static constexpr int chunk = 128;       // elements that share a batch of eight Philox counters
  static constexpr int block_bytes = 32;  // a whole block of codes: 16 words of 16 bits
};

constexpr int block_elements(int bits) { return GroupTraits::block_bytes * 8 / bits; }
static_assert(block_elements(1) == 2 * GroupTraits::chunk && block_elements(2) == GroupTraits::chunk && block_elements(8) == 32);

QUANTIZE_HOST_DEVICE int64_t code_bytes(int64_t elements, int bits) { return (elements * bits + 7) / 8; }

// Bytes of one sample's codes: each group starts on a byte of its own.
QUANTIZE_HOST_DEVICE int64_t sample_code_bytes(int64_t elements, int64_t group_size, int bits) {
  return elements / group_size * code_bytes(group_size, bits) + code_bytes(elements % group_size, bits);
}

// ---------------------------------------------------------------------------------------------------------------- range

// What min/max over a group gives. `finite` is false when the group holds a NaN or an infinity.
struct Extent {
  float min, max;
  bool finite;
};

// The range as stored. `second` is the scale for fp32 and the maximum for 16-bit types.
struct StoredRange {
  uint16_t first, second;
};

// The range as used. `fixed_point` = 2^F/scale, F the fractional bits of the code arithmetic; 0 when all elements are equal to min.
// `extreme` marks scales for which that quotient or x - min leaves fp32's normal numbers; they take the path in double.
struct Range {
  float min, scale, fixed_point;
  bool extreme;
};

QUANTIZE_HOST_DEVICE constexpr int fraction_bits(int bits) { return bits == 8 ? 16 : 16 - bits; }

namespace detail {

QUANTIZE_HOST_DEVICE uint16_t bf16_toward_minus_infinity(float x) {
  const uint32_t bits = float_bits(x);
  uint32_t upper = bits >> 16;
  if ((bits & 0xffffu) && (bits >> 31)) ++upper;
  return uint16_t(upper == 0xff80u ? 0xff7fu : upper);  // finite values stay finite
}

// Which zero a minimum over {-0, +0} returns depends on the order of the operands; the format has one.
QUANTIZE_HOST_DEVICE float positive_zero(float x) { return x + 0.f; }

constexpr float largest = 3.4028234e38f;

// Beyond what float32 can tell apart, the widest levels that are finite: what lies above them becomes the topmost.
QUANTIZE_HOST_DEVICE float spread(float min, float max, float levels) {
  const float difference = max - min;
  return (difference <= largest ? difference : largest) / levels;
}

QUANTIZE_HOST_DEVICE Range make_range(float min, float scale, int bits) {
  Range range{min, scale, 0.f, false};
  range.extreme = scale != 0.f && !(scale >= 0x1p-96f && scale <= 0x1p112f && min > -0x1p127f);
  if (scale != 0.f && !range.extreme) range.fixed_point = float(1 << fraction_bits(bits)) / scale;
  return range;
}

}  // namespace detail

template <typename T>
QUANTIZE_HOST_DEVICE StoredRange store_range(Extent extent, int bits);

template <>
QUANTIZE_HOST_DEVICE StoredRange store_range<F32>(Extent extent, int bits) {
  if (!extent.finite) return {0x7fc0, 0x7fc0};
  const float levels = float((1 << bits) - 1);
  const uint16_t first = detail::bf16_toward_minus_infinity(detail::positive_zero(extent.min));
  const float min = to_float(BF16{first});
  // Truncate, and step up only if the top level would miss the maximum: a scale that bf16 holds exactly is kept exactly.
  uint16_t second = truncate_to_bf16(detail::spread(min, detail::positive_zero(extent.max), levels)).bits;
  if (!(min + levels * to_float(BF16{second}) >= extent.max) && levels * to_float(BF16{uint16_t(second + 1)}) <= detail::largest) ++second;
  return {first, second};
}

template <>
QUANTIZE_HOST_DEVICE StoredRange store_range<BF16>(Extent extent, int) {
  if (!extent.finite) return {0x7fc0, 0x7fc0};
  return {truncate_to_bf16(detail::positive_zero(extent.min)).bits, truncate_to_bf16(detail::positive_zero(extent.max)).bits};
}

template <>
QUANTIZE_HOST_DEVICE StoredRange store_range<F16>(Extent extent, int) {
  if (!extent.finite) return {0x7e00, 0x7e00};
  // Both are elements, so the conversion is exact.
  const auto stored = [](float x) { return uint16_t(split_number(detail::positive_zero(x), F16{}) >> 16); };
  return {stored(extent.min), stored(extent.max)};
}

template <typename T>
QUANTIZE_HOST_DEVICE Range load_range(StoredRange stored, int bits);

template <>
QUANTIZE_HOST_DEVICE Range load_range<F32>(StoredRange stored, int bits) {
  return detail::make_range(to_float(BF16{stored.first}), to_float(BF16{stored.second}), bits);
}

template <>
QUANTIZE_HOST_DEVICE Range load_range<BF16>(StoredRange stored, int bits) {
  const float min = to_float(BF16{stored.first}), max = to_float(BF16{stored.second});
  return detail::make_range(min, detail::spread(min, max, float((1 << bits) - 1)), bits);
}

template <>
QUANTIZE_HOST_DEVICE Range load_range<F16>(StoredRange stored, int bits) {
  const float min = to_float(F16{stored.first}), max = to_float(F16{stored.second});
  return detail::make_range(min, detail::spread(min, max, float((1 << bits) - 1)), bits);
}

QUANTIZE_HOST_DEVICE bool is_poisoned(Range range) { return range.min != range.min; }

// ---------------------------------------------------------------------------------------------------------------- codes

// Where element e of a group finds its 16 random bits: Philox counter word 0, output word, half, byte swap.
QUANTIZE_HOST_DEVICE uint32_t noise_counter(int64_t e) { return uint32_t(e / GroupTraits::chunk * 8 + e % 8); }

QUANTIZE_HOST_DEVICE uint32_t noise_bits(const Philox4& draw, int64_t e) {
  const int j = int(e % GroupTraits::chunk) / 16, half = int(e % 16) / 8;
  const uint32_t u = (draw.word[j % 4] >> (16 * half)) & 0xffffu;
  return j < 4 ? u : ((u << 8) | (u >> 8)) & 0xffffu;
}

// Fixed point with F fractional bits, rounded to nearest by adding 2^23 (below 8 bits) so that the sum of code and noise fits 16 bits
// and saturates at the top code. At 8 bits that would leave F = 8 and a bias of 1/512 step, hence F = 16 in a wider word.
QUANTIZE_HOST_DEVICE uint32_t encode(float x, Range range, uint32_t u, int bits) {
  const uint32_t top = (1u << bits) - 1;
  if (range.extreme) {
    const double t = (double(x) - double(range.min)) / double(range.scale) + double(u) * 0x1p-16;
    return t <= 0 ? 0u : t >= double(top) ? top : uint32_t(t);
  }
  const float t = (x - range.min) * range.fixed_point;
  if (bits == 8) {
    const uint32_t code = (uint32_t(t + 0.5f) + u) >> 16;
    return code < top ? code : top;
  }
  const uint32_t sum = (float_bits(t + 8388608.f) & 0xffffu) + (u >> bits);
  return (sum < 0xffffu ? sum : 0xffffu) >> (16 - bits);
}

QUANTIZE_HOST_DEVICE float decode(uint32_t code, Range range) { return range.min + float(code) * range.scale; }

// Where the code of element e (of a group of n) sits, as a bit position from the start of the group's codes.
QUANTIZE_HOST_DEVICE int64_t code_bit(int64_t e, int64_t n, int bits) {
  const int64_t block = GroupTraits::block_bytes * 8 / bits, whole = n / block * block;
  if (e >= whole) return e * bits;
  const int64_t i = e % block;
  const int64_t word = 2 * (i % 8) + i % 16 / 8;
  return e / block * (GroupTraits::block_bytes * 8) + word * 16 + i / 16 * bits;
}

// Decoded values of a 16-bit type fall between its numbers; rounding them to nearest would bias the mean, so they are dithered.
// The dither is a pure function of the seed and the place: unpacking twice gives the same tensor. Its 16 bits are a group's own start and
// multiples of the golden ratio from there: uniform for each element, spread evenly over neighbours, and one addition where a hash of the
// place would take most of the time of unpacking. It is far below the quantization noise.
QUANTIZE_HOST_DEVICE uint32_t dither_key(uint32_t group, Seed seed) {
  return hash32(group ^ uint32_t(seed.seed) ^ hash32(uint32_t(seed.seed >> 32) ^ uint32_t(seed.offset))) >> 16;
}

constexpr uint32_t dither_step = 0x9E37;

QUANTIZE_HOST_DEVICE uint32_t dither_bits(uint32_t key, int64_t e) { return (key + uint32_t(e) * dither_step) & 0xffffu; }

// What round_to rounds.
template <typename T>
QUANTIZE_HOST_DEVICE uint32_t split_level(float value) {
  if constexpr (T::scalar == Scalar::f16)
    if (value > 65504.f) value = 65504.f;  // the top level may exceed the maximum by an fp32 ulp
  return split_number(value, T{});
}

template <typename T>
QUANTIZE_HOST_DEVICE T round_to(float value, uint32_t dither) {
  if constexpr (T::scalar == Scalar::f32)
    return {value};
  else
    return {uint16_t((split_level<T>(value) + dither) >> 16)};
}

}  // namespace quantize::activation
