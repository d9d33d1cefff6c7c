// Packing with AVX2 what has no whole step: the end of a group, and groups smaller than a chunk. Codes are made a byte each and in order,
// and then put where the format has them.
#pragma once

#include "group_quantize_simd.h"

namespace quantize::activation {
namespace {

// V: the AVX2 trait.
template <class V>
struct TailAvx2 {
  using I = __m256i;
  static constexpr int chunk = GroupTraits::chunk;

  // Elements [begin, n) of a group of n, begin a multiple of the step; end is n, since what ends before consists of whole steps.
  template <typename T, int bits>
  static void encode(const T* x, int64_t begin, int64_t, int64_t n, uint32_t group, Range range, Seed seed, uint8_t* codes) {
    static_assert(V::ways * chunk >= block_elements(1));
    const RoundKeys keys(seed);
    alignas(32) uint8_t code[V::ways * chunk];
    uint32_t counter[V::ways], owner[V::ways] = {};
    for (int w = 0; w < V::ways; ++w) counter[w] = noise_counter(begin + w * chunk);
    I draw[V::ways][4];
    philox<V>(counter, owner, group, keys, draw);
    for (int w = 0; w < V::ways && begin + w * chunk < n; ++w)
      encode_chunk<T, bits>(x + begin + w * chunk, least(chunk, n - begin - w * chunk), range, draw[w], code + w * chunk);
    place_codes<bits>(code, n - begin, codes + begin * bits / 8);
  }

  // Whole groups with ordinary ranges of at most a chunk. Returns whether that is what they are.
  template <typename T, int bits>
  static bool encode_groups(const T* x, int groups, int64_t group_size, uint32_t group, const Range* range, Seed seed, uint8_t* codes) {
    if (group_size > chunk) return false;
    const RoundKeys keys(seed);
    const int64_t bytes = code_bytes(group_size, bits);
    for (int first = 0; first < groups; first += V::ways) {
      uint32_t counter[V::ways] = {}, owner[V::ways];
      for (int w = 0; w < V::ways; ++w) owner[w] = uint32_t(first + w);
      I draw[V::ways][4];
      philox<V>(counter, owner, group, keys, draw);
      for (int w = 0; w < V::ways && first + w < groups; ++w) {
        alignas(32) uint8_t code[chunk];
        encode_chunk<T, bits>(x + (first + w) * group_size, group_size, range[first + w], draw[w], code);
        place_codes<bits>(code, group_size, codes + (first + w) * bytes);
      }
    }
    return true;
  }

 private:
  // Codes of n <= chunk elements, and zeros up to the next multiple of 16.
  template <typename T, int bits>
  static void encode_chunk(const T* x, int64_t n, const Range& range, const I* draw, uint8_t* code) {
    const __m256 min = V::set(range.min), scale = V::set(range.fixed_point);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      if (16 * j >= n) return;
      T part[16];
      const T* source = x + 16 * j;
      if (16 * j + 16 > n) source = static_cast<const T*>(std::memcpy(part, source, (n - 16 * j) * sizeof(T)));
      const I u = j < 4 ? draw[j] : V::swap_bytes16(draw[j - 4]);
      const __m256 t0 = V::mul(V::sub(V::load(source), min), scale), t1 = V::mul(V::sub(V::load(source + 8), min), scale);
      I codes;
      if constexpr (bits == 8)
        codes = V::join_halves(V::encode8(t0, V::template low16<0>(u)), V::encode8(t1, V::template low16<1>(u)));
      else
        codes = V::template shift_right16<16 - bits>(
            V::add_saturating16(V::join_halves(V::magic(t0), V::magic(t1)), V::template shift_right16<bits>(u)));
      // Lane l holds the codes of l and l + 8.
      const I order = _mm256_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                       0, 4, 8, 12, 2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1);
      codes = _mm256_shuffle_epi8(codes, order);
      __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
      if (16 * j + 16 > n) {
        const __m128i places = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        bytes = _mm_and_si128(bytes, _mm_cmplt_epi8(places, _mm_set1_epi8(char(n - 16 * j))));
      }
      _mm_store_si128(reinterpret_cast<__m128i*>(code + 16 * j), bytes);
    }
  }

  static __m128i load16(const uint8_t* p) { return _mm_load_si128(reinterpret_cast<const __m128i*>(p)); }

  // As the words of a block have sixteen elements in a row: 0, 8, 1, 9, ...
  static __m128i load_block_row(const uint8_t* p) {
    const __m128i row = load16(p);
    return _mm_unpacklo_epi8(row, _mm_unpackhi_epi64(row, row));
  }

  // Whole blocks, then the rest in order, 16 codes at a time.
  template <int bits>
  static void place_codes(const uint8_t* code, int64_t n, uint8_t* target) {
    int64_t e = 0;
    if constexpr (bits >= 4)
      for (constexpr int block = block_elements(bits); e + block <= n; e += block, target += GroupTraits::block_bytes) {
        __m128i low = load_block_row(code + e), high = load_block_row(code + e + block / 2);
        if constexpr (bits == 4) {
          low = _mm_or_si128(low, _mm_slli_epi16(load_block_row(code + e + 16), 4));
          high = _mm_or_si128(high, _mm_slli_epi16(load_block_row(code + e + 48), 4));
        }
        auto* words = reinterpret_cast<__m128i*>(target);
        _mm_storeu_si128(words, _mm_unpacklo_epi8(low, high)), _mm_storeu_si128(words + 1, _mm_unpackhi_epi8(low, high));
      }
    for (; e < n; e += 16, target += 2 * bits) {
      __m128i packed = load16(code + e);
      if constexpr (bits == 1) packed = _mm_cvtsi32_si128(_mm_movemask_epi8(_mm_slli_epi16(packed, 7)));
      if constexpr (bits == 2 || bits == 4) packed = _mm_maddubs_epi16(packed, _mm_set1_epi16(int16_t(1 | 1 << (8 + bits))));
      if constexpr (bits == 2) packed = _mm_madd_epi16(packed, _mm_set1_epi32(1 | 16 << 16)), packed = _mm_packs_epi32(packed, packed);
      if constexpr (bits == 2 || bits == 4) packed = _mm_packus_epi16(packed, packed);
      alignas(16) uint8_t bytes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes), packed);
      std::memcpy(target, bytes, e + 16 <= n ? 2 * bits : code_bytes(n - e, bits));
    }
  }
};

}  // namespace
}  // namespace quantize::activation
