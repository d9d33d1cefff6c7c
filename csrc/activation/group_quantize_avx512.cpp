// group_quantize for AVX-512 (F, BW, VL, DQ): two columns of eight lanes, a chunk of 128 elements and its successor.
#include "group_quantize_avx2.h"
#include "group_quantize_decode_avx2.h"
#include "group_quantize_run.h"

namespace quantize::activation {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int columns = 2;

  static F load(const F32* x) { return _mm512_loadu_ps(&x->value); }
  static F load(const F16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  static F load(const BF16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
  }
  template <typename T>
  static F load_columns(const T* x) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(Avx2::load(x)), Avx2::load(x + GroupTraits::chunk), 1);
  }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static bool all_zero(F a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_EQ_OQ) == 0xffff; }
  static float reduce_min(F a) { return Avx2::reduce_min(_mm256_min_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
  static float reduce_max(F a) { return Avx2::reduce_max(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }

  static I zero_int() { return _mm512_setzero_si512(); }
  static I set32(uint32_t value) { return _mm512_set1_epi32(int(value)); }
  static I set64(uint64_t value) { return _mm512_set1_epi64(int64_t(value)); }
  static I numbers32() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  static I xor_(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_and(I a, I b, I mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }
  static I set16(uint16_t value) { return _mm512_set1_epi16(short(value)); }
  static I add_saturating16(I a, I b) { return _mm512_adds_epu16(a, b); }
  template <int n>
  static I shift_right16(I a) {
    return _mm512_srli_epi16(a, n);
  }
  template <int n>
  static I shift_left16(I a) {
    return _mm512_slli_epi16(a, n);
  }
  static I shift_right32(I a, int n) { return _mm512_srli_epi32(a, n); }
  static I swap_bytes16(I a) { return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(Avx2::byte_swaps())); }
  template <int half>
  static I low16(I u) {
    return half ? _mm512_srli_epi32(u, 16) : and_(u, _mm512_set1_epi32(0xffff));
  }
  static I magic(F t) { return _mm512_castps_si512(add(t, set(8388608.f))); }
  static I join_halves(I low, I high) {
    const __m128i upward = _mm_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13);
    return _mm512_mask_shuffle_epi8(low, 0xCCCCCCCCCCCCCCCCu, high, _mm512_broadcast_i32x4(upward));
  }
  static I encode8(F t, I u) {
    const I code = _mm512_srli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(add(t, set(0.5f))), u), 16);
    return _mm512_min_epi32(code, _mm512_set1_epi32(255));
  }

  static void multiply(I a, I b, I* high, I* low) {
    const I even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    *low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  }
  static constexpr int ways = 4;

  static void store_columns(uint8_t* codes, int stride, I word) {
    Avx2::store_columns(codes, 0, _mm512_castsi512_si256(word));
    Avx2::store_columns(codes + stride, 0, _mm512_extracti32x8_epi32(word, 1));
  }
  // A block of 1-bit codes is both chunks: the first in the low byte of each word, its successor in the high one.
  static void store_one_bit(uint8_t* codes, I word) {
    const __m256i low = _mm256_srli_epi16(_mm512_castsi512_si256(word), 8);
    Avx2::store_columns(codes, 0, _mm256_or_si256(low, _mm512_extracti32x8_epi32(word, 1)));
  }
};

struct Kernels : Simd<Avx512, EncodeAvx2>, DecodeAvx2 {};

}  // namespace

const GroupKernels group_kernels_avx512[3][4] = QUANTIZE_GROUP_KERNELS(Kernels);

}  // namespace quantize::activation
