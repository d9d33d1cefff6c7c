// Drawing the codes of elements whose range is known: a bundle from registers, or any bytes one by one.
#pragma once

#include "group_places.cuh"

namespace quantize::activation {

// What the bundle's arithmetic needs of a unit's range.
struct alignas(8) UnitLevel {
  float min, fixed_point;
};

// True where that arithmetic, which neither saturates (below 8 bits) nor uses double, gives encode()'s codes: x - min and its product
// are monotonic in x, so the largest element answers for all.
QUANTIZE_DEVICE bool is_plain(Range range, float max, int bits) {
  if (is_poisoned(range) || range.extreme) return false;
  const float top = float(((1 << bits) - 1) << fraction_bits(bits));
  return bits == 8 || (max - range.min) * range.fixed_point + 8388608.f <= 8388608.f + top;
}

// encode() without its last shift: the code in the upper bits of the word's second byte. `magic` is the float 2^23 + u. Additions
// toward zero are the floors of group_format.h, and move the sum to where it is wanted, without a conversion or an integer operation:
// below 8 bits the product's unit in the last place is 2^bits, at 8 bits that of 2^31 is 2^8.
template <int bits>
QUANTIZE_DEVICE uint32_t encode_word(float x, UnitLevel level, float magic) {
  const float t = (x - level.min) * level.fixed_point;
  if constexpr (bits == 8) {
    const float s = fminf(t + 0.5f, 255.f * 65536.f);
    return float_bits(__fadd_rz(__fadd_rz(s, magic), 2147483648.f - 8388608.f));
  } else {
    return float_bits(__fmaf_rz(t + 8388608.f, float(1 << bits), magic));
  }
}

// Writes the `dwords` 32-bit words of codes of a bundle. vectors: its rows. levels: shared, [units]. noise: shared, NoiseLayout.
template <typename T, int bits>
QUANTIZE_DEVICE void encode_bundle(const uint4 (&vectors)[8], const UnitLevel* levels, const uint32_t* noise, int lane, int dwords,
                                   uint32_t* codes) {
  constexpr int V = VectorTraits<T>::elements;
  using L = Lanes<V>;
  using C = CodeLayout<V, bits>;
  const int octet = L::octet(lane);
  const uint32_t selector = NoiseLayout::selector(octet);
  noise += NoiseLayout::word(L::chunk(0, lane), NoiseLayout::output(octet), L::residue(lane, 0));
  // The codes of elements 4*quad .. 4*quad + 3 of a row.
  const auto encode_quad = [&](int row, int quad, uint32_t(&word)[4]) {
    const uint4 draw = *reinterpret_cast<const uint4*>(noise + NoiseLayout::word(L::chunk(row, 0), 0, 4 * quad));
    const UnitLevel level = levels[L::unit(row)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t magic = byte_permute(vector_word(draw, i), NoiseLayout::magic, selector);
      word[i] = encode_word<bits>(vector_element<T>(vectors[row], 4 * quad + i), level, bits_float(magic));
    }
  };
  const int first = C::target(lane, 0);  // its other targets differ by constants
  codes += first;
  static_for<C::registers>([&]<int reg>() {
    uint32_t word = 0;
    if constexpr (C::rows_in_bytes) {
      static_for<C::fields / 2>([&]<int pair>() {
        uint32_t even[4], odd[4];
        encode_quad(2 * pair, 0, even);
        encode_quad(2 * pair + 1, 0, odd);
        word = merge_field<bits, 2 * pair>(word, gather_codes(even[0], odd[0], even[2], odd[2]));
        word = merge_field<bits, 2 * pair + 1>(word, gather_codes(even[1], odd[1], even[3], odd[3]));
      });
    } else {
      static_for<C::fields>([&]<int field>() {
        constexpr auto from = C::source(reg, 0, field);
        uint32_t quad[4];
        encode_quad(from.row, from.i / 4, quad);
        word = merge_field<bits, field>(word, gather_codes(quad[0], quad[1], quad[2], quad[3]));
      });
    }
    static_for<C::steps>([&]<int s>() {
      constexpr auto step = C::step(s);
      word = exchange_fields<step.distance>(word, __shfl_xor_sync(Warp::all, word, step.mask), (lane & step.mask) != 0);
    });
    if (first + C::target(0, reg) < dwords) codes[C::target(0, reg)] = word;
  });
}

// The element whose code is the i-th of a byte of a group of n: the inverse of code_bit.
QUANTIZE_DEVICE int64_t byte_element(int64_t byte, int i, int64_t n, int bits) {
  const int64_t block = GroupTraits::block_bytes * 8 / bits, per_byte = 8 / bits;
  if (byte >= n / block * GroupTraits::block_bytes) return byte * per_byte + i;
  const int64_t word = byte % GroupTraits::block_bytes / 2, j = byte % 2 * per_byte + i;
  return byte / GroupTraits::block_bytes * block + word / 2 + 8 * (word % 2) + 16 * j;
}

// Any bytes of a group's codes, by the warp; each byte has one writer. x, codes: the group's first. n: its elements.
template <typename T>
QUANTIZE_DEVICE void encode_bytes(const T* x, int64_t n, uint32_t group, Range range, int bits, Seed seed, int64_t first_byte,
                                  int64_t last_byte, int lane, uint8_t* codes) {
  const bool poisoned = is_poisoned(range);
  for (int64_t byte = first_byte + lane; byte < last_byte; byte += Warp::lanes) {
    uint32_t value = 0, counter = 0;
    Philox4 draw;
    for (int i = 0; i < 8 / bits && !poisoned; ++i) {
      const int64_t e = byte_element(byte, i, n, bits);
      if (e >= n) break;
      if (i == 0 || noise_counter(e) != counter) draw = philox4x32(counter = noise_counter(e), group, seed);
      value |= encode(to_float(x[e]), range, noise_bits(draw, e), bits) << (bits * i);
    }
    codes[byte] = uint8_t(value);
  }
}

}  // namespace quantize::activation
