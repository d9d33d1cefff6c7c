// The words kernels of binary_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lanes.h"
#include "binary_kernels.h"

namespace quantize::packed {
namespace {

// A register of 64-bit words: Lanes' width.
using Words = uint64_t __attribute__((vector_size(4 * Lanes::width)));
using HalfWords = int32_t __attribute__((vector_size(2 * Lanes::width)));
constexpr int word_lanes = Lanes::width / 2;

template <typename T>
QUANTIZE_INLINE Words load_words(const T* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

QUANTIZE_INLINE uint64_t load_word(const void* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// sum + a + b: the carry is returned.
QUANTIZE_INLINE Words full_add(Words& sum, Words a, Words b) {
#ifdef __AVX512F__
  const Words carry = (Words)_mm512_ternarylogic_epi64((__m512i)sum, (__m512i)a, (__m512i)b, 0xe8);
  sum = (Words)_mm512_ternarylogic_epi64((__m512i)sum, (__m512i)a, (__m512i)b, 0x96);
#else
  const Words differ = sum ^ a, carry = (sum & a) | (differ & b);
  sum = differ ^ b;
#endif
  return carry;
}

// Popcounts of bytes, and sums of a word's bytes.
#if defined(__AVX512BW__) || defined(__AVX2__)
#ifdef __AVX512BW__
#define QUANTIZE_BYTES(name) _mm512_##name
#define QUANTIZE_WHOLE(name) _mm512_##name##_si512
using Register = __m512i;
QUANTIZE_INLINE Register each_quarter(__m128i v) { return _mm512_broadcast_i32x4(v); }
#else
#define QUANTIZE_BYTES(name) _mm256_##name
#define QUANTIZE_WHOLE(name) _mm256_##name##_si256
using Register = __m256i;
QUANTIZE_INLINE Register each_quarter(__m128i v) { return _mm256_broadcastsi128_si256(v); }
#endif
QUANTIZE_INLINE Words byte_counts(Words v) {
  const Register table = each_quarter(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Register low = QUANTIZE_BYTES(set1_epi8)(15), whole = (Register)v;
  return (Words)QUANTIZE_BYTES(add_epi8)(
      QUANTIZE_BYTES(shuffle_epi8)(table, QUANTIZE_WHOLE(and)(whole, low)),
      QUANTIZE_BYTES(shuffle_epi8)(table, QUANTIZE_WHOLE(and)(QUANTIZE_BYTES(srli_epi16)(whole, 4), low)));
}
QUANTIZE_INLINE Words sum_bytes(Words v) { return (Words)QUANTIZE_BYTES(sad_epu8)((Register)v, QUANTIZE_WHOLE(setzero)()); }
QUANTIZE_INLINE int64_t sum_words(Words v) {
#ifdef __AVX512BW__
  return _mm512_reduce_add_epi64((__m512i)v);
#else
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
#endif
}
#else
QUANTIZE_INLINE Words byte_counts(Words v) {
  constexpr uint64_t ones = 0x5555555555555555, pairs = 0x3333333333333333, nibbles = 0x0f0f0f0f0f0f0f0f;
  v -= v >> 1 & ones;
  v = (v & pairs) + (v >> 2 & pairs);
  return (v + (v >> 4)) & nibbles;
}
QUANTIZE_INLINE Words sum_bytes(Words v) {
  v = (v & 0x00ff00ff00ff00ff) + (v >> 8 & 0x00ff00ff00ff00ff);
  v += v >> 16;
  return (v + (v >> 32)) & 0xffff;
}
QUANTIZE_INLINE int64_t sum_words(Words v) {
  int64_t total = 0;
  for (int lane = 0; lane < word_lanes; ++lane) total += int64_t(v[lane]);
  return total;
}
#endif

// Bytes are added up carefully: eight lanes' bytes below 32, then by wrapping vectors of bytes.
QUANTIZE_INLINE Words add_bytes(Words a, Words b) {
  using Bytes = uint8_t __attribute__((vector_size(sizeof(Words))));
  return (Words)((Bytes)a + (Bytes)b);
}

// Popcounts by carry-save adders (Harley and Seal's method): of eight words one is counted.
struct CarrySave {
  static constexpr int most = 31;  // blocks of eight words before bytes overflow
  Words ones{}, twos{}, fours{}, eights{}, rest{}, total{};

  template <typename Word>
  QUANTIZE_INLINE void add8(Word word) {
    const Words a = full_add(ones, word(0), word(1)), b = full_add(ones, word(2), word(3)), c = full_add(twos, a, b);
    const Words d = full_add(ones, word(4), word(5)), e = full_add(ones, word(6), word(7)), f = full_add(twos, d, e);
    eights = add_bytes(eights, byte_counts(full_add(fours, c, f)));
  }
  QUANTIZE_INLINE void add(Words word) { rest = add_bytes(rest, byte_counts(word)); }
  QUANTIZE_INLINE void flush() { total += sum_bytes(eights) << 3, eights = Words{}; }
  QUANTIZE_INLINE Words result(bool any) {
    if (!any) return sum_bytes(rest);
    const Words two = byte_counts(twos), four = byte_counts(fours), twice = add_bytes(four, four);
    flush();
    return total + sum_bytes(add_bytes(add_bytes(add_bytes(rest, byte_counts(ones)), add_bytes(two, two)), add_bytes(twice, twice)));
  }
};

template <typename Count, int vectors, int channels>
QUANTIZE_INLINE void word_tile(const uint64_t* x, int64_t words, const uint8_t* codes, int32_t* counts) {
  Count count[channels][vectors];
  const auto word = [&](int64_t k, int c, int v) __attribute__((always_inline)) {
    return load_words(x + k * BinaryTraits::stride + v * word_lanes) ^ load_word(codes + (c * words + k) * 8);
  };
  int64_t k = 0;
  for (; k + 8 <= words; k += 8) {
#pragma GCC unroll 4
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) count[c][v].add8([&](int i) __attribute__((always_inline)) { return word(k + i, c, v); });
    if ((k / 8 + 1) % Count::most == 0)
      for (auto& row : count)
        for (Count& one : row) one.flush();
  }
  for (; k < words; ++k)
#pragma GCC unroll 4
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) count[c][v].add(word(k, c, v));
#pragma GCC unroll 4
  for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const HalfWords result = __builtin_convertvector(count[c][v].result(words >= 8), HalfWords);
      std::memcpy(counts + c * BinaryTraits::stride + v * word_lanes, &result, sizeof result);
    }
}

// Two registers of pixels by two channels: a tile's words stay in the cache while the channels pass.
template <typename Count>
void multiply(const uint64_t* x, int64_t words, int64_t count, const uint8_t* codes, int channels, int32_t* counts) {
  for (int64_t p = 0; p < count; p += 2 * word_lanes)
    for (int c = 0; c < channels; c += 2) {
      const bool pair = c + 2 <= channels;
      const auto run = count - p > word_lanes ? (pair ? word_tile<Count, 2, 2> : word_tile<Count, 2, 1>)
                                              : (pair ? word_tile<Count, 1, 2> : word_tile<Count, 1, 1>);
      run(x + p, words, codes + c * words * 8, counts + c * BinaryTraits::stride + p);
    }
}

// Lanes are words of K here: weights straight from memory.
template <typename Count>
void multiply_row(const uint64_t* x, int64_t words, const uint8_t* codes, int64_t rows, int32_t* counts) {
  const int64_t vectors = words / word_lanes;
  for (int64_t n = 0; n < rows; ++n, codes += words * 8) {
    Count count;
    const auto word = [&](int64_t v) __attribute__((always_inline)) {
      return load_words(x + v * word_lanes) ^ load_words(codes + v * word_lanes * 8);
    };
    int64_t v = 0;
    for (; v + 8 <= vectors; v += 8) {
#pragma GCC unroll 8
      for (int line = 0; line < int(8 * sizeof(Words)); line += 64)
        __builtin_prefetch(codes + v * word_lanes * 8 + BinaryTraits::row_bytes_ahead + line);
      count.add8([&](int i) __attribute__((always_inline)) { return word(v + i); });
      if ((v / 8 + 1) % Count::most == 0) count.flush();
    }
    for (; v < vectors; ++v) count.add(word(v));
    int64_t total = sum_words(count.result(vectors >= 8));
    for (int64_t k = vectors * word_lanes; k < words; ++k) {
      Words one{};
      one[0] = x[k] ^ load_word(codes + k * 8);
      total += int64_t(sum_bytes(byte_counts(one))[0]);
    }
    counts[n] = int32_t(total);
  }
}

}  // namespace
}  // namespace quantize::packed
