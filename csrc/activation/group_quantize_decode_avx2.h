// Unpacking with AVX2, for both vector ISAs: two AVX-512 columns are 128 elements apart, and storing them in halves is slower than this.
#pragma once

#include <immintrin.h>

#include "group_quantize_scalar.h"

namespace quantize::activation {
namespace {

struct DecodeAvx2 {
  using I = __m256i;
  using F = __m256;

  template <typename T, int bits>
  static void decode(const uint8_t* codes, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, T* y) {
    if (is_poisoned(range)) return scalar_decode<T, bits>(codes, begin, end, n, group, range, seed, y);
    constexpr int block = block_elements(bits);
    const Levels<bits> levels(range);
    const uint32_t key = T::scalar == Scalar::f32 ? 0 : dither_key(group, seed);
    int64_t e = begin;
    for (; e + block <= end; e += block) decode_block<T, bits>(codes + e * bits / 8, e, levels, key, y + e);
    // The end of the group, which is in order: what ends before consists of whole blocks.
    for (; e + 8 <= end; e += 8) store(y + e, levels(load_in_order<bits>(codes + e * bits / 8, bits)), dither(key, e, y));
    if (e == end) return;
    T last[8];
    store(last, levels(load_in_order<bits>(codes + e * bits / 8, code_bytes(end - e, bits))), dither(key, e, y));
    std::memcpy(y + e, last, (end - e) * sizeof(T));
  }

 private:
  // Codes (in the low bits of each lane, whatever is above them) to values.
  template <int bits>
  struct Levels {
    F min, scale, table;
    explicit Levels(Range range) : min(_mm256_set1_ps(range.min)), scale(_mm256_set1_ps(range.scale)) {
      alignas(32) float level[8];
      for (int i = 0; i < 8; ++i) level[i] = activation::decode(uint32_t(i) & ((1u << (bits < 2 ? bits : 2)) - 1), range);
      table = _mm256_load_ps(level);
    }
    F operator()(I code) const {
      if constexpr (bits <= 2) return _mm256_permutevar_ps(table, code);  // reads two bits a lane
      return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1))), scale), min);
    }
  };

  // Eight codes that follow each other, of which there are `bytes` bytes.
  template <int bits>
  static I load_in_order(const uint8_t* codes, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, codes, bytes);
    if constexpr (bits == 8) return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(word)));
    return _mm256_srlv_epi32(_mm256_set1_epi32(int(uint32_t(word))),
                             _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits));
  }

  static I hash(I x) {
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(0x7feb352d));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(int(0x846ca68bu)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  }
  static I dither(uint32_t, int64_t, const F32*) { return _mm256_setzero_si256(); }
  template <typename T>
  static I dither(uint32_t key, int64_t e, const T*) {
    const I place = _mm256_add_epi32(_mm256_set1_epi32(int(uint32_t(e))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const I spread = _mm256_mullo_epi32(place, _mm256_set1_epi32(int(0x9E3779B9u)));
    return _mm256_srli_epi32(hash(_mm256_add_epi32(spread, _mm256_set1_epi32(int(key)))), 16);
  }

  static void store(F32* y, F value, I) { _mm256_storeu_ps(&y->value, value); }
  static void store(BF16* y, F value, I dither) { store16(y, _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(value), dither), 16)); }
  // round_stochastic_f16 without its branches; the value is finite here.
  static void store(F16* y, F value, I dither) {
    const I bits = _mm256_castps_si256(_mm256_min_ps(_mm256_set1_ps(65504.f), value));
    const I magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)),
            sign = _mm256_srli_epi32(_mm256_xor_si256(bits, magnitude), 16);
    const I fixed = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p40f)));
    const I small = _mm256_srli_epi32(_mm256_add_epi32(fixed, dither), 16);
    const I rounded = _mm256_add_epi32(magnitude, _mm256_and_si256(dither, _mm256_set1_epi32(0x1fff)));
    const I normal = _mm256_srli_epi32(_mm256_sub_epi32(rounded, _mm256_set1_epi32(0x38000000)), 13);
    const I is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), magnitude);
    store16(y, _mm256_or_si256(sign, _mm256_blendv_epi8(normal, small, is_small)));
  }
  static void store16(void* y, I lanes) {
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(y), _mm256_castsi256_si128(packed));
  }

  // 32 bytes of codes to 256/bits values: word w's codes are those of lane w/2, half w%2, so a shift brings eight neighbours into place.
  template <typename T, int bits>
  __attribute__((always_inline)) static void decode_block(const uint8_t* codes, int64_t e, const Levels<bits>& levels, uint32_t key, T* y) {
    const I word = _mm256_loadu_si256(reinterpret_cast<const I*>(codes));
#pragma GCC unroll 16
    for (int j = 0; j < 16 / bits; ++j) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int place = 16 * j + 8 * half;
        store(y + place, levels(_mm256_srli_epi32(word, 16 * half + bits * j)), dither(key, e + place, y));
      }
    }
  }
};

}  // namespace
}  // namespace quantize::activation
