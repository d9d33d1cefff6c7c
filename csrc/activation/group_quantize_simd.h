// group_quantize for vector ISAs: one algorithm over a trait `V` of 8-lane columns. AVX2 has one column (a chunk of 128 elements at a
// time), AVX-512 two (the chunk and its successor side by side), so both walk the same blocks and write the same bytes.
//
// A step loads the floats of two 8-lane vectors, turns them into fixed point by adding 2^23, joins them as the halves of 32-bit lanes
// and works on 16-bit lanes from there: one saturating add is rounding, noise and clamp at once.
#pragma once

#include "group_quantize_scalar.h"

namespace quantize::activation {
namespace {

// Rest: the primitives for what is left after the last whole step.
template <class V, class Rest>
struct Simd {
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int columns = V::columns, chunk = GroupTraits::chunk;

  template <typename T>
  static Extent extent(const T* x, int64_t n) {
    constexpr int width = 8 * columns;
    if (n < 2 * width) return scalar_extent(x, n);
    F low0 = V::load(x), low1 = V::load(x + width), high0 = low0, high1 = low1;
    F poison0 = V::fma(low0, V::zero(), V::zero()), poison1 = V::fma(low1, V::zero(), V::zero());
    const auto join = [&](const T* p) __attribute__((always_inline)) {
      const F a = V::load(p), b = V::load(p + width);
      low0 = V::min(low0, a), high0 = V::max(high0, a), poison0 = V::fma(a, V::zero(), poison0);
      low1 = V::min(low1, b), high1 = V::max(high1, b), poison1 = V::fma(b, V::zero(), poison1);
    };
    int64_t i = 2 * width;
    for (; i + 4 * width <= n; i += 4 * width) join(x + i), join(x + i + 2 * width);
    for (; i + 2 * width <= n; i += 2 * width) join(x + i);
    if (i < n) join(x + n - 2 * width);  // overlaps what was seen: a minimum does not mind
    return {V::reduce_min(V::min(low0, low1)), V::reduce_max(V::max(high0, high1)), V::all_zero(V::add(poison0, poison1))};
  }

  template <typename T, int bits>
  static void encode(const T* x, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, uint8_t* codes) {
    int64_t e = begin;
    if (!range.extreme)
      for (; e + step<bits> <= end; e += step<bits>) encode_step<T, bits>(x, e, group, range, seed, codes);
    if (e == end) return;
    if (range.extreme)
      scalar_encode<T, bits>(x, e, end, n, group, range, seed, codes);
    else
      Rest::template encode<T, bits>(x, e, end, n, group, range, seed, codes);
  }

  template <typename T, int bits>
  static void decode(const uint8_t* codes, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, T* y) {
    if (is_poisoned(range)) return scalar_decode<T, bits>(codes, begin, end, n, group, range, seed, y);
    int64_t e = begin;
    if (e + step<bits> <= end) {
      const typename V::template Levels<bits> levels(range);
      const uint32_t key = T::scalar == Scalar::f32 ? 0 : dither_key(group, seed);
      for (; e + step<bits> <= end; e += step<bits>) decode_step<T, bits>(codes, e, levels, key, y);
    }
    if (e < end) Rest::template decode<T, bits>(codes, e, end, n, group, range, seed, y);
  }

 private:
  template <int bits>
  static constexpr int step = bits == 1 ? 2 * chunk : columns * chunk;  // a block of 1-bit codes spans two chunks

  template <typename T, int bits>
  __attribute__((always_inline)) static void encode_step(const T* x, int64_t e, uint32_t group, Range range, Seed seed, uint8_t* codes) {
    constexpr int positions = 16 / bits, stride = chunk * bits / 8;  // stride: bytes between the codes of neighbouring chunks
    const F min = V::set(range.min), scale = V::set(range.fixed_point);
    codes += e * bits / 8;
    I word = V::zero_int();
    for (int sub = 0; sub < step<bits> / (columns * chunk); ++sub) {
      I draw[4];
      V::philox(noise_counter(e + sub * chunk), group, seed, draw);
      const T* source = x + e + sub * chunk;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const I u = j < 4 ? draw[j] : V::swap_bytes16(draw[j - 4]);
        const F t0 = V::mul(V::sub(V::load_columns(source + 16 * j), min), scale);
        const F t1 = V::mul(V::sub(V::load_columns(source + 16 * j + 8), min), scale);
        if constexpr (bits == 8) {
          const I code = V::join_halves(V::encode8(t0, V::template low16<0>(u)), V::encode8(t1, V::template low16<1>(u)));
          word = j % 2 ? V::or_(word, V::template shift_left16<8>(code)) : code;
        } else {
          const I fixed = V::join_halves(V::magic(t0), V::magic(t1));
          const I sum = V::add_saturating16(fixed, V::template shift_right16<bits>(u));
          word = V::or_(V::template shift_right16<bits>(word), V::and_(sum, V::set16(uint16_t(0xffffu << (16 - bits)))));
        }
        if ((j + 1) % positions == 0) V::store_columns(codes + (j + 1 - positions) * 2 * bits, stride, word);
      }
    }
    if constexpr (bits == 1) V::store_one_bit(codes, word);
  }

  template <typename T, int bits>
  __attribute__((always_inline)) static void decode_step(const uint8_t* codes, int64_t e, const typename V::template Levels<bits>& levels,
                                                         uint32_t key, T* y) {
    constexpr int stride = chunk * bits / 8, block = block_elements(bits);
    constexpr int positions = bits == 1 ? 16 / columns : 16 / bits;
    codes += e * bits / 8;
    for (int base = 0; base < step<bits> / columns; base += bits == 1 ? step<bits> : block) {
      const I word = bits == 1 ? V::load_one_bit(codes) : V::load_words(codes + base * bits / 8, stride);
#pragma GCC unroll 16
      for (int j = 0; j < positions; ++j) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int64_t place = e + base + 16 * j + 8 * half;
          V::store_columns(y + place, levels(V::shift_right32(word, 16 * half + bits * j)), V::dither(key, place, y));
        }
      }
    }
  }
};

}  // namespace
}  // namespace quantize::activation
