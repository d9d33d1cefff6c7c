// Integer products of packed weights in AVX-512 with VNNI: four u8 * s8 products a lane and instruction, exact in int32.
#include <immintrin.h>

#include "gemm_run.h"

namespace quantize::packed {
namespace {

QUANTIZE_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
QUANTIZE_INLINE __m512i table_of(const Weights& w) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.levels)));
}
QUANTIZE_INLINE __m512i four_bytes(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// The levels of field `s` of each byte.
template <int bits>
QUANTIZE_INLINE __m512i field(__m512i packed, int s, __m512i table) {
  if constexpr (bits == 8) return packed;
  const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
  return _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srl_epi16(packed, _mm_cvtsi32_si128(s * bits)), mask));
}

template <int bits>
QUANTIZE_INLINE void decode_block(const uint8_t* codes, __m512i table, int8_t* levels) {
  const __m512i packed = load(codes);
  for (int s = 0; s < 8 / bits; ++s) _mm512_storeu_si512(levels + s * GemmTraits::quad_bytes, field<bits>(packed, s, table));
}

template <int bits>
void decode_as(const Weights& w, int8_t* levels) {
  const __m512i table = table_of(w);
  constexpr int share = 8 / bits;
  for (int64_t i = 0; i < w.quads / share; ++i)
    decode_block<bits>(w.codes + i * GemmTraits::quad_bytes, table, levels + i * share * GemmTraits::quad_bytes);
}

void decode(const Weights& w, int8_t* levels) {
  if (w.bits == 8) return decode_plain(w, levels);
  w.bits == 4 ? decode_as<4>(w, levels) : decode_as<2>(w, levels);
}

template <int count, int tiles>
void tile(const uint8_t* x, const int32_t* rows, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels,
          int64_t panel_bytes, int32_t* acc) {
  __m512i sum[count][tiles];
#pragma GCC unroll 12
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < tiles; ++p) sum[i][p] = _mm512_setzero_si512();
  for (int t = 0; t < tap_count; ++t) {
    const uint8_t* row[count];
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i) row[i] = x + rows[i] + taps[t];
    for (int64_t q = 0; q < quads; ++q, levels += GemmTraits::quad_bytes) {
      __m512i w[tiles];
#pragma GCC unroll 2
      for (int p = 0; p < tiles; ++p) w[p] = load(levels + p * panel_bytes);
#pragma GCC unroll 12
      for (int i = 0; i < count; ++i) {
        const __m512i v = four_bytes(row[i] + 4 * q);
#pragma GCC unroll 2
        for (int p = 0; p < tiles; ++p) sum[i][p] = _mm512_dpbusd_epi32(sum[i][p], v, w[p]);
      }
    }
  }
  for (int i = 0; i < count; ++i)
    for (int p = 0; p < tiles; ++p) _mm512_storeu_si512(acc + (i * tiles + p) * GemmTraits::columns, sum[i][p]);
}

template <int tiles>
void multiply_tiles(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads,
                    const int8_t* levels, int64_t panel_bytes, int32_t* acc) {
  for (int i = 0; i < count;) {
    const int left = count - i, step = left >= 12 ? 12 : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto run = step == 12  ? tile<12, tiles>
                     : step == 8 ? tile<8, tiles>
                     : step == 4 ? tile<4, tiles>
                     : step == 2 ? tile<2, tiles>
                                 : tile<1, tiles>;
    run(x, rows + i, taps, tap_count, quads, levels, panel_bytes, acc + i * tiles * GemmTraits::columns);
    i += step;
  }
}

void multiply(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels,
              int64_t panel_bytes, int tiles, int, int32_t* acc) {
  const auto run = tiles == 2 ? multiply_tiles<2> : multiply_tiles<1>;
  run(x, rows, count, taps, tap_count, quads, levels, panel_bytes, acc);
}

template <int bits, int tiles>
void row_as(const uint8_t* x, const Weights& w, int32_t* acc) {
  constexpr int share = 8 / bits, chains = tiles > 1 ? share : 4;  // dpbusd takes five cycles
  const __m512i table = table_of(w);
  const int64_t blocks = w.quads / share, panel_bytes = w.bytes();
  __m512i sum[tiles][chains];
  for (auto& row : sum)
    for (__m512i& s : row) s = _mm512_setzero_si512();
  const auto block = [&](int64_t i, int chain) __attribute__((always_inline)) {
    const uint8_t* codes = w.codes + i * GemmTraits::quad_bytes;
#pragma GCC unroll 4
    for (int p = 0; p < tiles; ++p, codes += panel_bytes) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + GemmTraits::prefetch), _MM_HINT_T0);
      const __m512i packed = load(codes);
#pragma GCC unroll 4
      for (int s = 0; s < share; ++s) {
        __m512i& own = sum[p][(chain * share + s) % chains];
        own = _mm512_dpbusd_epi32(own, four_bytes(x + (i * share + s) * GemmTraits::quad), field<bits>(packed, s, table));
      }
    }
  };
  constexpr int unrolled = tiles > 1 ? 1 : 4;
  int64_t i = 0;
  for (; i + unrolled <= blocks; i += unrolled) {
#pragma GCC unroll 4
    for (int c = 0; c < unrolled; ++c) block(i + c, c);
  }
  for (; i < blocks; ++i) block(i, 0);
  for (int p = 0; p < tiles; ++p) {
    __m512i all = sum[p][0];
    for (int c = 1; c < chains; ++c) all = _mm512_add_epi32(all, sum[p][c]);
    _mm512_storeu_si512(acc + p * GemmTraits::columns, all);
  }
}

template <int bits>
void row_of(const uint8_t* x, const Weights& w, int tiles, int32_t* acc) {
  if (tiles == GemmTraits::streams) return row_as<bits, GemmTraits::streams>(x, w, acc);
  Weights one = w;
  for (int p = 0; p < tiles; ++p, one.codes += w.bytes()) row_as<bits, 1>(x, one, acc + p * GemmTraits::columns);
}

void multiply_row(const uint8_t* x, const Weights& w, int tiles, int32_t* acc) {
  w.bits == 8 ? row_of<8>(x, w, tiles, acc) : w.bits == 4 ? row_of<4>(x, w, tiles, acc) : row_of<2>(x, w, tiles, acc);
}

void multiply_row_float(const float* x, const Weights& w, float* acc) {
  const __m512i table = table_of(w);
  float_row(
      x, w, acc, [&](const uint8_t* codes, int8_t* levels) __attribute__((always_inline)) {
        w.bits == 8   ? decode_block<8>(codes, table, levels)
        : w.bits == 4 ? decode_block<4>(codes, table, levels)
                      : decode_block<2>(codes, table, levels);
      });
}

}  // namespace

const GemmKernels gemm_avx512vnni{decode, multiply, multiply_row, multiply_row_float};

}  // namespace quantize::packed
