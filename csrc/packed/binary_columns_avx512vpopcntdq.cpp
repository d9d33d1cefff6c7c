// The kernels of binary_columns.h: AVX-512 with its popcount.
#include "binary_columns.h"

#include <cstring>

#include "../core/lanes.h"
#include "../core/transpose_avx512.h"

namespace quantize::packed {
namespace {

constexpr int vectors = ColumnTraits::columns / 16;
constexpr int most_pixels = 8;  // by two vectors of columns: 16 registers of sums

void turn(const uint8_t* codes, int64_t words, int channels, uint32_t* columns) {
  for (int64_t k = 0; k < words; k += 16) {
    const int some = int(words - k < 16 ? words - k : 16);
    const __mmask16 there = __mmask16((1u << some) - 1);
    for (int v = 0; v < vectors; ++v) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int channel = 16 * v + i;
        block[i] = channel < channels ? _mm512_maskz_loadu_epi32(there, codes + (channel * words + k) * 4) : _mm512_setzero_si512();
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < some) _mm512_storeu_si512(columns + (k + i) * ColumnTraits::columns + 16 * v, block[i]);
    }
  }
}

template <int pixels>
void multiply_some(const uint32_t* x, int64_t step, ColumnRuns runs, const uint32_t* columns, const int32_t* offsets, const int32_t* places,
                   bool unit, int32_t* sums) {
  __m512i count[pixels][vectors];
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p)
    for (__m512i& c : count[p]) c = _mm512_setzero_si512();
  for (int64_t r = 0; r < runs.count; ++r) {
    const uint32_t* word = x + runs.starts[r];
    for (int64_t k = 0; k < runs.length; ++k, ++word, columns += ColumnTraits::columns) {
      const __m512i first = _mm512_loadu_si512(columns), second = _mm512_loadu_si512(columns + 16);
#pragma GCC unroll 8
      for (int p = 0; p < pixels; ++p) {
        const __m512i bits = _mm512_set1_epi32(int(word[p * step]));
        count[p][0] = _mm512_add_epi32(count[p][0], _mm512_popcnt_epi32(_mm512_xor_si512(bits, first)));
        count[p][1] = _mm512_add_epi32(count[p][1], _mm512_popcnt_epi32(_mm512_xor_si512(bits, second)));
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p)
    for (int v = 0; v < vectors; ++v) {
      const __m512i offset = _mm512_loadu_si512(offsets + places[p] + 16 * v);
      const __m512i c = count[p][v], sum = unit ? _mm512_add_epi32(offset, c) : _mm512_sub_epi32(offset, _mm512_add_epi32(c, c));
      _mm512_storeu_si512(sums + p * ColumnTraits::columns + 16 * v, sum);
    }
}

void multiply(const uint32_t* x, int64_t step, int64_t pixels, ColumnRuns runs, const uint32_t* columns, const int32_t* offsets,
              const int32_t* places, bool unit, int32_t* sums) {
  constexpr decltype(&multiply_some<1>) of[most_pixels] = {multiply_some<1>, multiply_some<2>, multiply_some<3>, multiply_some<4>,
                                                           multiply_some<5>, multiply_some<6>, multiply_some<7>, multiply_some<8>};
  // As even as can be.
  for (int64_t parts = (pixels + most_pixels - 1) / most_pixels, at = 0; parts > 0; --parts) {
    const int64_t some = (pixels - at + parts - 1) / parts;
    of[some - 1](x + at * step, step, runs, columns, offsets, places + at, unit, sums + at * ColumnTraits::columns);
    at += some;
  }
}

void compare(const int32_t* sums, int64_t pixels, int channels, const int32_t* threshold, uint32_t flip, uint8_t* bits, int64_t step) {
  const uint32_t there = channels < 32 ? (uint32_t(1) << channels) - 1 : ~uint32_t(0);
  const __mmask16 low = __mmask16(there), high = __mmask16(there >> 16);
  const __m512i first = _mm512_maskz_loadu_epi32(low, threshold), second = _mm512_maskz_loadu_epi32(high, threshold + 16);
  for (int64_t p = 0; p < pixels; ++p, sums += ColumnTraits::columns, bits += step) {
    const uint32_t lower = _mm512_mask_cmplt_epi32_mask(low, _mm512_loadu_si512(sums), first);
    const uint32_t higher = _mm512_mask_cmplt_epi32_mask(high, _mm512_loadu_si512(sums + 16), second);
    const uint32_t word = (lower | higher << 16) ^ (flip & there);
    std::memcpy(bits, &word, sizeof word);
  }
}

}  // namespace

const BinaryColumnKernels binary_columns_avx512vpopcntdq{turn, multiply, compare};

}  // namespace quantize::packed
