// A row of codes to floats in AVX-512: a permute looks up sixteen levels at a time and reads no more of its index than four bits.
#include <immintrin.h>

#include <cstring>

#include "decode_row_run.h"

namespace quantize::packed {
namespace {

// Sixteen codes: 2 * bits bytes. Bits above the fourth may be anything, but at 8.
template <int bits>
inline __attribute__((always_inline)) __m512i spread(const uint8_t* codes) {
  if constexpr (bits == 8) return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  if constexpr (bits == 4) {
    const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(which, words), shifts);
  }
  uint32_t word = 0;
  std::memcpy(&word, codes, 2 * bits);
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i fields = _mm512_srlv_epi32(_mm512_set1_epi32(int(word)), _mm512_mullo_epi32(places, _mm512_set1_epi32(bits)));
  return _mm512_and_si512(fields, _mm512_set1_epi32((1 << bits) - 1));
}

template <int bits>
void decode(const uint8_t* codes, int64_t columns, const float* levels, float scale, float* out) {
  const __m512 factor = _mm512_set1_ps(scale), table = _mm512_loadu_ps(levels);
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16, codes += 2 * bits) {
    const __m512i index = spread<bits>(codes);
    const __m512 level = bits == 8 ? _mm512_i32gather_ps(index, levels, 4) : _mm512_permutexvar_ps(index, table);
    _mm512_storeu_ps(out + k, _mm512_mul_ps(factor, level));
  }
  decode_rest<bits>(codes, columns - k, levels, scale, out + k);
}

void decode_row(const uint8_t* codes, int bits, int64_t columns, const float* levels, float scale, float* out) {
  for_bits(bits, [&]<int b>() { decode<b>(codes, columns, levels, scale, out); });
}

}  // namespace

const DecodeRow decode_row_avx512 = decode_row;

}  // namespace quantize::packed
