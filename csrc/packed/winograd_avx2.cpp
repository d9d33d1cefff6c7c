// The kernels of winograd_kernels.h in AVX2.
#include "winograd_kernels.h"

#include <immintrin.h>

#include <cstring>

#include "../core/lanes.h"
#include "gemm_kernels.h"

namespace quantize::packed {
namespace {

constexpr int positions = 16, taps = 9;
using Traits = WinogradTraits;

QUANTIZE_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
QUANTIZE_INLINE void store(__m256i v, void* p) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Four of a line (or column) of pixels, `step` apart.
QUANTIZE_INLINE void transform_four(__m256i* d, int step) {
  const __m256i a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
  d[0] = _mm256_sub_epi16(a, c), d[step] = _mm256_add_epi16(b, c);
  d[2 * step] = _mm256_sub_epi16(c, b), d[3 * step] = _mm256_sub_epi16(b, e);
}

void transform_pixels(const uint8_t* image, const int32_t* tiles, int64_t count, int64_t line, int64_t pixel, int64_t channels, int16_t* v,
                      int64_t v_plane) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < channels; c += Traits::lanes) {
      const uint8_t* from = image + tiles[i] + c;
      __m256i d[positions];
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p)
        d[p] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p / 4 * line + p % 4 * pixel)));
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) transform_four(d + 4 * row, 1);
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) transform_four(d + column, 4);
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p) store(d[p], v + p * v_plane + i * channels + c);
    }
}

// Three taps to four, the doubled ones: (2a, a + b + c, a - b + c, 2c).
QUANTIZE_INLINE void transform_three(__m256i a, __m256i b, __m256i c, __m256i* out, int step) {
  const __m256i ends = _mm256_add_epi16(a, c);
  out[0] = _mm256_add_epi16(a, a), out[step] = _mm256_add_epi16(ends, b);
  out[2 * step] = _mm256_sub_epi16(ends, b), out[3 * step] = _mm256_add_epi16(c, c);
}

// Positions of four columns' four channels.
QUANTIZE_INLINE void transform_taps(const int8_t* levels, int64_t tap, __m256i out[positions]) {
  __m256i lines[3][4];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    __m256i g[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) g[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + (3 * i + j) * tap)));
    transform_three(g[0], g[1], g[2], lines[i], 1);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) transform_three(lines[0][j], lines[1][j], lines[2][j], out + j, 4);
}

void transform_weights(const int8_t* levels, int64_t quads, int64_t channels, int16_t* u) {
  const int64_t tap = quads * GemmTraits::quad_bytes, plane = channels * Traits::columns;
  for (int64_t q = 0; q < quads; ++q, levels += GemmTraits::quad_bytes)
    for (int half = 0; half < 2; ++half) {  // eight columns
      __m256i first[positions], second[positions];
      transform_taps(levels + 32 * half, tap, first);
      transform_taps(levels + 32 * half + 16, tap, second);
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p) {  // qwords of a column's four channels: its pairs part
        const __m256 a = _mm256_castsi256_ps(first[p]), b = _mm256_castsi256_ps(second[p]);
        int16_t* target = u + p * plane + q * 4 * Traits::columns + half * 16;
        store(_mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8), target);
        store(_mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8), target + 2 * Traits::columns);
      }
    }
  for (int p = 0; p < positions; ++p)  // channels that are filled up
    std::memset(u + p * plane + quads * 4 * Traits::columns, 0, size_t(plane - quads * 4 * Traits::columns) * sizeof *u);
}

template <int count>
void multiply_tiles(const int16_t* v, int64_t channels, const int16_t* u, int32_t* sums) {
  __m256i acc[count][2];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  for (int64_t c = 0; c < channels; c += 2, u += 2 * Traits::columns) {
    const __m256i left = load(u), right = load(u + Traits::columns);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      int32_t two;
      std::memcpy(&two, v + i * channels + c, sizeof two);
      const __m256i x = _mm256_set1_epi32(two);
      acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(x, left));
      acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(x, right));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) store(acc[i][0], sums + i * Traits::columns), store(acc[i][1], sums + i * Traits::columns + 8);
}

// (a + b + c, b - c - d). Sums on the way may wrap around: what comes out fits.
QUANTIZE_INLINE void transform_sums(__m256i a, __m256i b, __m256i c, __m256i d, __m256i& first, __m256i& second) {
  first = _mm256_add_epi32(_mm256_add_epi32(a, b), c);
  second = _mm256_sub_epi32(_mm256_sub_epi32(b, c), d);
}

void multiply(const int16_t* v, int64_t v_plane, int64_t count, int64_t channels, const int16_t* u, int32_t* sums, int64_t pitch) {
  constexpr int64_t row = Traits::columns, position = Traits::block * row;
  alignas(32) int32_t products[positions * position];
  for (int p = 0; p < positions; ++p, v += v_plane, u += channels * row)
    for (int64_t i = 0; i < count;) {
      const int64_t left = count - i;
      const auto run = left >= 6 ? multiply_tiles<6> : left >= 4 ? multiply_tiles<4> : left >= 2 ? multiply_tiles<2> : multiply_tiles<1>;
      run(v + i * channels, channels, u, products + p * position + i * row);
      i += left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
  for (int64_t i = 0; i < count; ++i)
    for (int half = 0; half < 2; ++half) {
      const int32_t* m = products + i * row + 8 * half;
      __m256i lines[2][4], out[2][2];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        transform_sums(load(m + j * position), load(m + (4 + j) * position), load(m + (8 + j) * position), load(m + (12 + j) * position),
                       lines[0][j], lines[1][j]);
#pragma GCC unroll 2
      for (int y = 0; y < 2; ++y) {
        transform_sums(lines[y][0], lines[y][1], lines[y][2], lines[y][3], out[y][0], out[y][1]);
        for (int x = 0; x < 2; ++x) store(_mm256_srai_epi32(out[y][x], 2), sums + y * pitch + (2 * i + x) * row + 8 * half);
      }
    }
}

}  // namespace

const WinogradKernels winograd_avx2{transform_pixels, transform_weights, multiply};

}  // namespace quantize::packed
