// Integer products of packed weights in AVX2: u8 * s8 pairs in int16 (maddubs) where levels are small enough, several pairs at a time
// where they are smaller still (ternary: 64), else widened to 16 bits.
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

// Sums of products, four a dword: `add` takes one quad's, `flush` empties what adds up in 16 bits.
//
// Pairs of products in int16. Several at a time where levels are small (Weights::steps): two instructions for 32 products, not three.
template <bool several>
struct Narrow {
  static constexpr bool flushes = several;
  __m256i w;
  QUANTIZE_INLINE explicit Narrow(__m256i levels) : w(levels) {}
  QUANTIZE_INLINE __m256i add(__m256i sum, __m256i x) const {
    const __m256i pairs = _mm256_maddubs_epi16(x, w);
    return several ? _mm256_add_epi16(sum, pairs) : _mm256_add_epi32(sum, widened(pairs));
  }
  static QUANTIZE_INLINE __m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
};
// Even bytes and odd bytes of the weights as int16.
struct Wide {
  static constexpr bool flushes = false;
  __m256i even, odd;
  QUANTIZE_INLINE explicit Wide(__m256i levels)
      : even(_mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8)), odd(_mm256_srai_epi16(levels, 8)) {}
  QUANTIZE_INLINE __m256i add(__m256i acc, __m256i x) const {
    const __m256i low = _mm256_and_si256(x, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(x, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
  }
};

constexpr int fewest_steps = 4;  // before flushing pays

// `count` sums of two halves, and how many steps they still hold.
template <int count, typename Product>
struct Sums {
  __m256i now[count][2], total[count][2];
  const int steps;
  int64_t left;

  QUANTIZE_INLINE explicit Sums(int most) : steps(most), left(most) {
    for (int i = 0; i < count; ++i) now[i][0] = now[i][1] = total[i][0] = total[i][1] = _mm256_setzero_si256();
  }
  QUANTIZE_INLINE void flush() {
    for (int i = 0; i < count; ++i)
      for (int h = 0; h < 2; ++h)
        total[i][h] = _mm256_add_epi32(total[i][h], Narrow<true>::widened(now[i][h])), now[i][h] = _mm256_setzero_si256();
    left = steps;
  }
  // How many of `wanted` steps may follow.
  QUANTIZE_INLINE int64_t take(int64_t wanted) {
    if constexpr (!Product::flushes) return wanted;
    if (left == 0) flush();
    const int64_t taken = left < wanted ? left : wanted;
    left -= taken;
    return taken;
  }
  QUANTIZE_INLINE __m256i result(int i, int h) const { return Product::flushes ? total[i][h] : now[i][h]; }
};

template <int count, typename Product>
void tile(const uint8_t* x, const int32_t* rows, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels, int steps,
          int32_t* acc, int acc_stride) {
  Sums<count, Product> sums(steps);
  for (int t = 0; t < tap_count; ++t) {
    const uint8_t* row[count];
    for (int i = 0; i < count; ++i) row[i] = x + rows[i] + taps[t];
    for (int64_t q = 0; q < quads;)
      for (const int64_t end = q + sums.take(quads - q); q < end; ++q, levels += GemmTraits::quad_bytes) {
        const Product left(load(levels)), right(load(levels + 32));
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
          int32_t four;
          std::memcpy(&four, row[i] + 4 * q, 4);
          const __m256i v = _mm256_set1_epi32(four);
          sums.now[i][0] = left.add(sums.now[i][0], v), sums.now[i][1] = right.add(sums.now[i][1], v);
        }
      }
  }
  if constexpr (Product::flushes) sums.flush();
  for (int i = 0; i < count; ++i) store(sums.result(i, 0), acc + i * acc_stride), store(sums.result(i, 1), acc + i * acc_stride + 8);
}

template <typename Product>
void multiply_with(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads,
                   const int8_t* levels, int64_t panel_bytes, int tiles, int steps, int32_t* acc) {
  const int stride = tiles * GemmTraits::columns;
  for (int i = 0; i < count;) {
    const int left = count - i, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int p = 0; p < tiles; ++p) {
      const auto run = some == 4 ? tile<4, Product> : some == 2 ? tile<2, Product> : tile<1, Product>;
      run(x, rows + i, taps, tap_count, quads, levels + p * panel_bytes, steps, acc + i * stride + p * GemmTraits::columns, stride);
    }
    i += some;
  }
}

void multiply(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels,
              int64_t panel_bytes, int tiles, int steps, int32_t* acc) {
  const auto run = steps >= fewest_steps ? multiply_with<Narrow<true>> : steps ? multiply_with<Narrow<false>> : multiply_with<Wide>;
  run(x, rows, count, taps, tap_count, quads, levels, panel_bytes, tiles, steps, acc);
}

template <int bits, typename Product>
void row_as(const uint8_t* x, const Weights& w, int32_t* acc) {
  constexpr int share = 8 / bits;
  const __m256i table = table_of(w);
  Sums<share, Product> sums(w.steps);
  const uint8_t* codes = w.codes;
  for (int64_t i = 0; i < w.quads / share;)
    for (const int64_t end = i + sums.take(w.quads / share - i); i < end;
         ++i, codes += GemmTraits::quad_bytes, x += share * GemmTraits::quad) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + GemmTraits::prefetch), _MM_HINT_T0);
      const __m256i left = load(codes), right = load(codes + 32);
#pragma GCC unroll 4
      for (int s = 0; s < share; ++s) {
        int32_t four;
        std::memcpy(&four, x + 4 * s, 4);
        const __m256i v = _mm256_set1_epi32(four);
        sums.now[s][0] = Product(field<bits>(left, s, table)).add(sums.now[s][0], v);
        sums.now[s][1] = Product(field<bits>(right, s, table)).add(sums.now[s][1], v);
      }
    }
  if constexpr (Product::flushes) sums.flush();
  for (int h = 0; h < 2; ++h) {
    __m256i sum = sums.result(0, h);
    for (int s = 1; s < share; ++s) sum = _mm256_add_epi32(sum, sums.result(s, h));
    store(sum, acc + 8 * h);
  }
}

template <int bits>
void row_of(const uint8_t* x, const Weights& w, int32_t* acc) {
  const auto run = w.steps >= fewest_steps ? row_as<bits, Narrow<true>> : w.steps ? row_as<bits, Narrow<false>> : row_as<bits, Wide>;
  run(x, w, acc);
}

void multiply_row(const uint8_t* x, const Weights& first, int tiles, int32_t* acc) {
  Weights w = first;  // panel by panel: there are no registers for more
  for (int p = 0; p < tiles; ++p, w.codes += w.bytes(), acc += GemmTraits::columns)
    w.bits == 8 ? row_of<8>(x, w, acc) : w.bits == 4 ? row_of<4>(x, w, acc) : row_of<2>(x, w, acc);
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
