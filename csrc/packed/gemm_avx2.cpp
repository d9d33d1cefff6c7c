// Integer products of packed weights in AVX2: u8 * s8 pairs in int16 (maddubs) where levels are small enough, else widened to 16 bits.
#include <immintrin.h>

#include "gemm_run.h"

namespace quantize::packed {
namespace {

QUANTIZE_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
QUANTIZE_INLINE void store(__m256i v, void* p) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
QUANTIZE_INLINE __m256i table_of(const Weights& w) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.levels)));
}

// The levels of field `s` of each byte.
template <int bits>
QUANTIZE_INLINE __m256i field(__m256i packed, int s, __m256i table) {
  if constexpr (bits == 8) return packed;
  const __m256i mask = _mm256_set1_epi8((1 << bits) - 1);
  return _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srl_epi16(packed, _mm_cvtsi32_si128(s * bits)), mask));
}

template <int bits>
QUANTIZE_INLINE void decode_block(const uint8_t* codes, __m256i table, int8_t* levels) {
  for (int half = 0; half < 2; ++half) {
    const __m256i packed = load(codes + 32 * half);
    for (int s = 0; s < 8 / bits; ++s) store(field<bits>(packed, s, table), levels + s * GemmTraits::quad_bytes + 32 * half);
  }
}

template <int bits>
void decode_as(const Weights& w, int8_t* levels) {
  const __m256i table = table_of(w);
  constexpr int share = 8 / bits;
  for (int64_t i = 0; i < w.quads / share; ++i)
    decode_block<bits>(w.codes + i * GemmTraits::quad_bytes, table, levels + i * share * GemmTraits::quad_bytes);
}

void decode(const Weights& w, int8_t* levels) {
  if (w.bits == 8) return decode_plain(w, levels);
  w.bits == 4 ? decode_as<4>(w, levels) : decode_as<2>(w, levels);
}

// acc + the four products of each dword. Widened: even bytes and odd bytes of the weights as int16.
struct Narrow {
  __m256i w;
  QUANTIZE_INLINE explicit Narrow(__m256i levels) : w(levels) {}
  QUANTIZE_INLINE __m256i add(__m256i acc, __m256i x) const {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
  }
};
struct Wide {
  __m256i even, odd;
  QUANTIZE_INLINE explicit Wide(__m256i levels)
      : even(_mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8)), odd(_mm256_srai_epi16(levels, 8)) {}
  QUANTIZE_INLINE __m256i add(__m256i acc, __m256i x) const {
    const __m256i low = _mm256_and_si256(x, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(x, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
  }
};

template <int count, typename Product>
void tile(const uint8_t* x, const int32_t* rows, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels, int32_t* acc,
          int acc_stride) {
  __m256i sum[count][2];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
  for (int t = 0; t < tap_count; ++t) {
    const uint8_t* row[count];
    for (int i = 0; i < count; ++i) row[i] = x + rows[i] + taps[t];
    for (int64_t q = 0; q < quads; ++q, levels += GemmTraits::quad_bytes) {
      const Product left(load(levels)), right(load(levels + 32));
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        int32_t four;
        std::memcpy(&four, row[i] + 4 * q, 4);
        const __m256i v = _mm256_set1_epi32(four);
        sum[i][0] = left.add(sum[i][0], v), sum[i][1] = right.add(sum[i][1], v);
      }
    }
  }
  for (int i = 0; i < count; ++i) store(sum[i][0], acc + i * acc_stride), store(sum[i][1], acc + i * acc_stride + 8);
}

template <typename Product>
void multiply_with(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads,
                   const int8_t* levels, int64_t panel_bytes, int tiles, int32_t* acc) {
  const int stride = tiles * GemmTraits::columns;
  for (int i = 0; i < count;) {
    const int left = count - i, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int p = 0; p < tiles; ++p) {
      const auto run = step == 4 ? tile<4, Product> : step == 2 ? tile<2, Product> : tile<1, Product>;
      run(x, rows + i, taps, tap_count, quads, levels + p * panel_bytes, acc + i * stride + p * GemmTraits::columns, stride);
    }
    i += step;
  }
}

void multiply(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels,
              int64_t panel_bytes, int tiles, bool narrow, int32_t* acc) {
  const auto run = narrow ? multiply_with<Narrow> : multiply_with<Wide>;
  run(x, rows, count, taps, tap_count, quads, levels, panel_bytes, tiles, acc);
}

template <int bits, typename Product>
void row_as(const uint8_t* x, const Weights& w, int32_t* acc) {
  constexpr int share = 8 / bits;
  const __m256i table = table_of(w);
  __m256i sum[share][2];
  for (auto& s : sum) s[0] = s[1] = _mm256_setzero_si256();
  const uint8_t* codes = w.codes;
  for (int64_t i = 0; i < w.quads / share; ++i, codes += GemmTraits::quad_bytes, x += share * GemmTraits::quad) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + GemmTraits::prefetch), _MM_HINT_T0);
    const __m256i left = load(codes), right = load(codes + 32);
#pragma GCC unroll 4
    for (int s = 0; s < share; ++s) {
      int32_t four;
      std::memcpy(&four, x + 4 * s, 4);
      const __m256i v = _mm256_set1_epi32(four);
      sum[s][0] = Product(field<bits>(left, s, table)).add(sum[s][0], v);
      sum[s][1] = Product(field<bits>(right, s, table)).add(sum[s][1], v);
    }
  }
  for (int s = 1; s < share; ++s)
    for (int h = 0; h < 2; ++h) sum[0][h] = _mm256_add_epi32(sum[0][h], sum[s][h]);
  store(sum[0][0], acc), store(sum[0][1], acc + 8);
}

void multiply_row(const uint8_t* x, const Weights& w, int32_t* acc) {
  if (w.bits == 8) return w.narrow ? row_as<8, Narrow>(x, w, acc) : row_as<8, Wide>(x, w, acc);
  if (w.bits == 4) return w.narrow ? row_as<4, Narrow>(x, w, acc) : row_as<4, Wide>(x, w, acc);
  return w.narrow ? row_as<2, Narrow>(x, w, acc) : row_as<2, Wide>(x, w, acc);
}

void multiply_row_float(const float* x, const Weights& w, float* acc) {
  const __m256i table = table_of(w);
  float_row(
      x, w, acc, [&](const uint8_t* codes, int8_t* levels) __attribute__((always_inline)) {
        w.bits == 8   ? decode_block<8>(codes, table, levels)
        : w.bits == 4 ? decode_block<4>(codes, table, levels)
                      : decode_block<2>(codes, table, levels);
      });
}

}  // namespace

const GemmKernels gemm_avx2{decode, multiply, multiply_row, multiply_row_float};

}  // namespace quantize::packed
