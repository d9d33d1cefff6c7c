// Packing with AVX2: the trait of group_quantize_simd.h with one column of eight lanes. FMA is for the poison test only.
#pragma once

#include <immintrin.h>

#include "group_quantize_simd.h"
#include "group_quantize_tail_avx2.h"

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
  static I set32(uint32_t value) { return _mm256_set1_epi32(int(value)); }
  static I set64(uint64_t value) { return _mm256_set1_epi64x(int64_t(value)); }
  static I numbers32() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  static I xor_(I a, I b, I c) { return xor_(xor_(a, b), c); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_and(I a, I b, I mask) { return or_(a, and_(b, mask)); }
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
  static __m128i byte_swaps() { return _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
  static I swap_bytes16(I a) { return _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(byte_swaps())); }
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
  static constexpr int ways = 2;

  static void store_columns(uint8_t* codes, int, I word) { _mm256_storeu_si256(reinterpret_cast<I*>(codes), word); }
  static void store_one_bit(uint8_t* codes, I word) { store_columns(codes, 0, word); }
};

using EncodeAvx2 = Simd<Avx2, TailAvx2<Avx2>>;

}  // namespace
}  // namespace quantize::activation
