// A row of codes to floats in AVX2: codes spread over 32-bit lanes by shifts, a table of sixteen in two registers.
#include <immintrin.h>

#include <cstring>

#include "decode_row_run.h"

namespace quantize::packed {
namespace {

// Eight codes: `bits` bytes.
template <int bits>
inline __attribute__((always_inline)) __m256i spread(const uint8_t* codes) {
  if constexpr (bits == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  uint32_t word = 0;
  std::memcpy(&word, codes, bits);
  const __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
  return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts), _mm256_set1_epi32((1 << bits) - 1));
}

template <int bits>
void decode(const uint8_t* codes, int64_t columns, const float* levels, float scale, float* out) {
  const __m256 factor = _mm256_set1_ps(scale), low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8, codes += bits) {
    const __m256i index = spread<bits>(codes);
    __m256 level;
    if constexpr (bits == 8)
      level = _mm256_i32gather_ps(levels, index, 4);
    else if constexpr (bits < 4)
      level = _mm256_permutevar8x32_ps(low, index);
    else
      level = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                               _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    _mm256_storeu_ps(out + k, _mm256_mul_ps(factor, level));
  }
  decode_rest<bits>(codes, columns - k, levels, scale, out + k);
}

void decode_row(const uint8_t* codes, int bits, int64_t columns, const float* levels, float scale, float* out) {
  for_bits(bits, [&]<int b>() { decode<b>(codes, columns, levels, scale, out); });
}

}  // namespace

const DecodeRow decode_row_avx2 = decode_row;

}  // namespace quantize::packed
