// Sixteen registers of sixteen dwords change rows and columns. For files compiled for AVX-512.
#pragma once

#include <immintrin.h>

namespace quantize {
namespace {

// Rows of four by four dwords change places within lanes, then lanes.
inline __attribute__((always_inline)) void transpose(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // t[4 k + i]: column 4 l + i of rows 4 k to 4 k + 3 in lane l
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88), d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace
}  // namespace quantize
