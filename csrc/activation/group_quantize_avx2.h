// The AVX2 trait of group_quantize_simd.h: one column of eight lanes. Needs AVX2, FMA (for the poison test only) and F16C.
#pragma once

#include <immintrin.h>

#include "group_quantize_simd.h"

namespace quantize::activation {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int columns = 1;

  static F load(const F32* x) { return _mm256_loadu_ps(&x->value); }
  static F load(const F16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
  static F load(const BF16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16));
  }
  template <typename T>
  static F load_columns(const T* x) {
    return load(x);
  }

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static bool all_zero(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_EQ_OQ)) == 0xff; }
  static float reduce_min(F a) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
  }
  static float reduce_max(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }

  static I zero_int() { return _mm256_setzero_si256(); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I set16(uint16_t value) { return _mm256_set1_epi16(short(value)); }
  static I add_saturating16(I a, I b) { return _mm256_adds_epu16(a, b); }
  template <int n>
  static I shift_right16(I a) {
    return _mm256_srli_epi16(a, n);
  }
  template <int n>
  static I shift_left16(I a) {
    return _mm256_slli_epi16(a, n);
  }
  static I shift_right32(I a, int n) { return _mm256_srli_epi32(a, n); }
  static I swap_bytes16(I a) { return or_(shift_left16<8>(a), shift_right16<8>(a)); }
  template <int half>
  static I low16(I u) {
    return half ? _mm256_srli_epi32(u, 16) : and_(u, _mm256_set1_epi32(0xffff));
  }
  static I magic(F t) { return _mm256_castps_si256(add(t, set(8388608.f))); }
  static I join_halves(I low, I high) { return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA); }
  static I encode8(F t, I u) {
    const I code = _mm256_srli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(add(t, set(0.5f))), u), 16);
    return _mm256_min_epi32(code, _mm256_set1_epi32(255));
  }

  // Eight counters side by side; 32x32->64-bit products exist for even lanes only, hence the shifts and blends.
  static void multiply(I a, I b, I* high, I* low) {
    const I even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  static void philox(uint32_t counter, uint32_t group, Seed seed, I* draw) {
    using P = PhiloxTraits;
    I c0 = _mm256_add_epi32(_mm256_set1_epi32(int(counter)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    I c1 = _mm256_set1_epi32(int(group)), c2 = _mm256_set1_epi32(int(uint32_t(seed.offset)));
    I c3 = _mm256_set1_epi32(int(uint32_t(seed.offset >> 32)));
    uint32_t k0 = uint32_t(seed.seed), k1 = uint32_t(seed.seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < P::rounds; ++round, k0 += P::weyl0, k1 += P::weyl1) {
      I high0, low0, high1, low1;
      multiply(c0, _mm256_set1_epi64x(P::multiplier0), &high0, &low0);
      multiply(c2, _mm256_set1_epi64x(P::multiplier1), &high1, &low1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(int(k0)));
      c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(int(k1)));
      c1 = low1, c3 = low0;
    }
    draw[0] = c0, draw[1] = c1, draw[2] = c2, draw[3] = c3;
  }

  static I load_words(const uint8_t* codes, int) { return _mm256_loadu_si256(reinterpret_cast<const I*>(codes)); }
  static I load_one_bit(const uint8_t* codes) { return load_words(codes, 0); }
  static void store_columns(uint8_t* codes, int, I word) { _mm256_storeu_si256(reinterpret_cast<I*>(codes), word); }
  static void store_one_bit(uint8_t* codes, I word) { store_columns(codes, 0, word); }

  // Codes (in the low bits of each lane, whatever is above them) to values.
  template <int bits>
  struct Levels {
    F min, scale, table;
    explicit Levels(Range range) : min(set(range.min)), scale(set(range.scale)) {
      alignas(32) float level[8];
      for (int i = 0; i < 8; ++i) level[i] = activation::decode(uint32_t(i) & ((1u << (bits < 2 ? bits : 2)) - 1), range);
      table = _mm256_load_ps(level);
    }
    F operator()(I code) const {
      if constexpr (bits <= 2) return _mm256_permutevar_ps(table, code);  // reads two bits a lane
      return add(mul(_mm256_cvtepi32_ps(and_(code, _mm256_set1_epi32((1 << bits) - 1))), scale), min);
    }
  };

  static I hash(I x) {
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(0x7feb352d));
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(int(0x846ca68bu)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  }
  static I dither(uint32_t, int64_t, const F32*) { return zero_int(); }
  template <typename T>
  static I dither(uint32_t key, int64_t e, const T*) {
    const I place = _mm256_add_epi32(_mm256_set1_epi32(int(uint32_t(e))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const I spread = _mm256_mullo_epi32(place, _mm256_set1_epi32(int(0x9E3779B9u)));
    return _mm256_srli_epi32(hash(_mm256_add_epi32(spread, _mm256_set1_epi32(int(key)))), 16);
  }

  static void store_columns(F32* y, F value, I) { _mm256_storeu_ps(&y->value, value); }
  static void store_columns(BF16* y, F value, I dither) {
    store16(y, _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(value), dither), 16));
  }
  // round_stochastic_f16 without its branches; the value is finite here.
  static void store_columns(F16* y, F value, I dither) {
    const I bits = _mm256_castps_si256(_mm256_min_ps(set(65504.f), value));
    const I magnitude = and_(bits, _mm256_set1_epi32(0x7fffffff)), sign = _mm256_srli_epi32(_mm256_xor_si256(bits, magnitude), 16);
    const I fixed = _mm256_cvttps_epi32(mul(_mm256_castsi256_ps(magnitude), set(0x1p40f)));
    const I small = _mm256_srli_epi32(_mm256_add_epi32(fixed, dither), 16);
    const I rounded = _mm256_add_epi32(magnitude, and_(dither, _mm256_set1_epi32(0x1fff)));
    const I normal = _mm256_srli_epi32(_mm256_sub_epi32(rounded, _mm256_set1_epi32(0x38000000)), 13);
    const I is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), magnitude);
    store16(y, or_(sign, _mm256_blendv_epi8(normal, small, is_small)));
  }
  static void store16(void* y, I lanes) {
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(y), _mm256_castsi256_si128(packed));
  }
};

// What is left is the specification's scalar code.
struct Scalars {
  template <typename T, int bits>
  static void encode(const T* x, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, uint8_t* codes) {
    scalar_encode<T, bits>(x, begin, end, n, group, range, seed, codes);
  }
  template <typename T, int bits>
  static void decode(const uint8_t* codes, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, T* y) {
    scalar_decode<T, bits>(codes, begin, end, n, group, range, seed, y);
  }
};

using SimdAvx2 = Simd<Avx2, Scalars>;

}  // namespace
}  // namespace quantize::activation
