// Packing for vector ISAs: one algorithm over a trait `V` of 8-lane columns. AVX2 has one column (a chunk of 128 elements at a
// time), AVX-512 two (the chunk and its successor side by side), so both walk the same blocks and write the same bytes.
//
// A step loads the floats of two 8-lane vectors, turns them into fixed point by adding 2^23, joins them as the halves of 32-bit lanes
// and works on 16-bit lanes from there: one saturating add is rounding, noise and clamp at once.
#pragma once

#include "group_quantize_scalar.h"

namespace quantize::activation {
namespace {

struct RoundKeys {
  Seed seed;
  uint32_t first[PhiloxTraits::rounds], second[PhiloxTraits::rounds];
  explicit RoundKeys(Seed seed) : seed(seed) {
    for (int round = 0; round < PhiloxTraits::rounds; ++round) {
      first[round] = uint32_t(seed.seed) + uint32_t(round) * PhiloxTraits::weyl0;
      second[round] = uint32_t(seed.seed >> 32) + uint32_t(round) * PhiloxTraits::weyl1;
    }
  }
};

// Philox for V::ways batches of counters side by side. counter: the first of each batch, the others follow it; owner: its group, counted
// from `group`. Inlined: called, it leaves the draws in memory, which costs AVX-512 a tenth of packing.
template <class V>
__attribute__((always_inline)) inline void philox(const uint32_t* counter, const uint32_t* owner, uint32_t group, const RoundKeys& keys,
                                                  typename V::I (*draw)[4]) {
  using I = typename V::I;
  const I m0 = V::set64(PhiloxTraits::multiplier0), m1 = V::set64(PhiloxTraits::multiplier1);
  for (int w = 0; w < V::ways; ++w) {
    const PhiloxStart start = philox_start(group + owner[w], keys.seed);
    I high, low, *c = draw[w];
    V::multiply(V::add32(V::set32(counter[w]), V::numbers32()), m0, &high, &low);
    c[2] = V::xor_(low, V::set32(start.second_after));
    V::multiply(V::xor_(high, V::set32(start.second)), m1, &high, &c[1]);
    c[0] = V::xor_(high, V::set32(start.first_after));
    c[3] = V::set32(start.last);
  }
#pragma GCC unroll 5
  for (int round = 2; round < PhiloxTraits::rounds; ++round) {
#pragma GCC unroll 4
    for (int w = 0; w < V::ways; ++w) {
      I high0, low0, high1, low1, *c = draw[w];
      V::multiply(c[0], m0, &high0, &low0);
      V::multiply(c[2], m1, &high1, &low1);
      c[0] = V::xor_(high1, c[1], V::set32(keys.first[round]));
      c[2] = V::xor_(high0, c[3], V::set32(keys.second[round]));
      c[1] = low1, c[3] = low0;
    }
  }
}

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
    if (range.extreme) return scalar_encode<T, bits>(x, begin, end, n, group, range, seed, codes);
    const int64_t stop = begin + (end - begin) / step<bits> * step<bits>;
    encode_steps<T, bits>(x, begin, stop - begin, stop - begin, group, &range, seed, codes);
    if (stop < end) Rest::template encode<T, bits>(x, stop, end, n, group, range, seed, codes);
  }

  // Several whole groups with ordinary ranges, where the group size is a multiple of the step or small. Returns whether it is.
  template <typename T, int bits>
  static bool encode_groups(const T* x, int groups, int64_t group_size, uint32_t group, const Range* range, Seed seed, uint8_t* codes) {
    if (group_size % step<bits> != 0) return Rest::template encode_groups<T, bits>(x, groups, group_size, group, range, seed, codes);
    encode_steps<T, bits>(x, 0, groups * group_size, group_size, group, range, seed, codes);
    return true;
  }

 private:
  template <int bits>
  static constexpr int step = bits == 1 ? 2 * chunk : columns* chunk;  // a block of 1-bit codes spans two chunks

  // Elements [begin, begin + count) counted from x, of groups of `group_size` that start at begin. A unit is what one batch of Philox
  // counters serves; several batches are drawn at once, since one alone is a single long chain of multiplications.
  template <typename T, int bits>
  static void encode_steps(const T* x, int64_t begin, int64_t count, int64_t group_size, uint32_t group, const Range* range, Seed seed,
                           uint8_t* codes) {
    constexpr int unit = columns * chunk, units_a_step = step<bits> / unit;
    const RoundKeys keys(seed);
    I draw[V::ways][4];
    int64_t place = 0;     // of the next unit in its group
    uint32_t current = 0;  // its group
    for (int64_t done = 0; done < count; done += V::ways * unit) {
      uint32_t counter[V::ways], owner[V::ways];
      for (int w = 0; w < V::ways; ++w) {  // counted on, since a 64-bit division takes as long as a group
        owner[w] = current, counter[w] = noise_counter(begin + place);
        place += unit;
        if (place == group_size) place = 0, ++current;
      }
      philox<V>(counter, owner, group, keys, draw);
      for (int w = 0; w < V::ways && done + w * unit < count; w += units_a_step)
        encode_step<T, bits>(x, begin + done + w * unit, range[owner[w]], draw[w], codes);
    }
  }

  // draw: four vectors a unit.
  template <typename T, int bits>
  __attribute__((always_inline)) static void encode_step(const T* x, int64_t e, const Range& range, const I* draws, uint8_t* codes) {
    constexpr int positions = 16 / bits, stride = chunk * bits / 8;  // stride: bytes between the codes of neighbouring chunks
    const F min = V::set(range.min), scale = V::set(range.fixed_point);
    codes += e * bits / 8;
    I word = V::zero_int();
    for (int sub = 0; sub < step<bits> / (columns * chunk); ++sub) {
      const I* draw = draws + 4 * sub;
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
          word = V::or_and(V::template shift_right16<bits>(word), sum, V::set16(uint16_t(0xffffu << (16 - bits))));
        }
        if ((j + 1) % positions == 0) V::store_columns(codes + (j + 1 - positions) * 2 * bits, stride, word);
      }
    }
    if constexpr (bits == 1) V::store_one_bit(codes, word);
  }
};

}  // namespace
}  // namespace quantize::activation
