// The lookup kernels of binary_kernels.h for AVX2 and AVX-512, included by one file per ISA.
//
// table[w][x] = popcount(w ^ x) of nibbles. A panel's byte is w << 4: where its table starts.
#pragma once

#include "binary_words_run.h"
#include "level_codes.h"

namespace quantize::packed {
namespace {

constexpr int outside_nibble = 128;

struct NibbleTables {
  alignas(64) uint8_t counts[16 * (outside_nibble + 1)];  // up to 16 * 16; zeros for what is outside of the image
};
constexpr NibbleTables nibble_tables = [] {
  NibbleTables tables{};
  for (int w = 0; w < 16; ++w)
    for (int x = 0; x < 16; ++x) {
      const int d = w ^ x;
      tables.counts[16 * w + x] = uint8_t((d & 1) + (d >> 1 & 1) + (d >> 2 & 1) + (d >> 3));
    }
  return tables;
}();

constexpr int bytes_lanes = sizeof(Register);
constexpr int64_t quads_before_overflow = 255 / BinaryTraits::quad;
constexpr int64_t few_pixels = 8;

// Eight bytes each of 2 x 16 pixels, transposed: four rounds of interleaving rotate the place of a byte, [pixel][byte], into [byte][pixel].
QUANTIZE_INLINE void transpose_words(const uint64_t* x, __m256i bytes[8]) {
  for (int i = 0; i < 8; ++i)
    bytes[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 2 * i))),
                                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 2 * i + 16)), 1);
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    __m256i next[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = _mm256_unpacklo_epi8(bytes[i], bytes[i + 4]);
      next[2 * i + 1] = _mm256_unpackhi_epi8(bytes[i], bytes[i + 4]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) bytes[i] = next[i];
  }
}

QUANTIZE_INLINE void store_pixels(uint8_t* target, __m256i bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bytes); }
QUANTIZE_INLINE __m256i load_pixels(const uint8_t* source) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)); }

void index(const uint64_t* words, int64_t pixels, int rows, uint8_t* nibbles, int64_t stride) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t p = 0; p < pixels; p += 32) {
    __m256i bytes[8];
    transpose_words(words + p, bytes);
    for (int i = 0; i < rows; i += 2) {
      store_pixels(nibbles + i * stride + p, _mm256_and_si256(bytes[i / 2], low));
      if (i + 1 < rows) store_pixels(nibbles + (i + 1) * stride + p, _mm256_and_si256(_mm256_srli_epi16(bytes[i / 2], 4), low));
    }
  }
}

// Lanes are pixels.
void pack_level_planes(const float* x, int64_t pixels, int channels, weight::LsqRange range, uint64_t* low, uint64_t* high) {
  for (int64_t p = 0; p < pixels; p += lanes) {
    uint64_t words[2][lanes] = {};
    for (int first = 0; first < channels; first += 32) {
      Lanes::Whole bits[2][Lanes::parts] = {};
      for (int c = first; c < channels && c < first + 32; ++c) {
        Lanes::Whole codes[Lanes::parts];
        codes_of(load_part(x + c * pixels + p, pixels - p), range, int32_t(-range.low), codes);
        for (int i = 0; i < Lanes::parts; ++i) {
          bits[0][i] |= (codes[i] & 1) << (c - first);
          bits[1][i] |= (codes[i] >> 1) << (c - first);
        }
      }
      uint32_t halves[2][lanes];
      std::memcpy(halves, bits, sizeof halves);
      for (int i = 0; i < 2; ++i)
        for (int l = 0; l < lanes; ++l) words[i][l] |= uint64_t(halves[i][l]) << first;
    }
    const size_t bytes = size_t(pixels - p < lanes ? pixels - p : lanes) * sizeof(uint64_t);
    std::memcpy(low + p, words[0], bytes), std::memcpy(high + p, words[1], bytes);
  }
}

// Bit `bit` of sixteen codes.
QUANTIZE_INLINE uint64_t bits_of_codes(const Lanes::Whole codes[Lanes::parts], int bit) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)codes[0], _mm512_set1_epi32(1 << bit));
#else
  return unsigned(_mm256_movemask_ps((__m256)(codes[0] << (31 - bit)))) | unsigned(_mm256_movemask_ps((__m256)(codes[1] << (31 - bit))))
                                                                              << 8;
#endif
}

// Lanes are channels.
void pack_level_rows(const float* x, int64_t step, int64_t pixels, int channels, weight::LsqRange range, uint64_t* low, uint64_t* high) {
  for (int64_t p = 0; p < pixels; ++p, x += step) {
    uint64_t words[2] = {};
    for (int c = 0; c < channels; c += lanes) {
      Lanes::Whole codes[Lanes::parts];
      codes_of(load_part(x + c, channels - c), range, int32_t(-range.low), codes);
      for (int i = 0; i < 2; ++i) words[i] |= bits_of_codes(codes, i) << c;
    }
    low[p] = words[0], high[p] = words[1];
  }
}

// 32 of a line's pixels, every `step`th; for other steps `count` of them.
template <int step>
QUANTIZE_INLINE void copy_pixels(const uint8_t* source, int64_t any_step, int64_t count, uint8_t* target) {
  if constexpr (step == 1) {
    store_pixels(target, load_pixels(source));
  } else if constexpr (step == 2) {
    const __m256i even = _mm256_set1_epi16(255), a = load_pixels(source), b = load_pixels(source + 32);
    store_pixels(target, _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_and_si256(a, even), _mm256_and_si256(b, even)), 0xd8));
  } else {
    for (int64_t i = 0; i < count && i < 32; ++i) target[i] = source[i * any_step];
  }
}

// Writes behind the lines' ends: what a line writes too much the next one mends, in this row or the one below.
template <int step>
void gather_lines(const uint8_t* image, const BinaryWindow& window, int64_t first, int64_t count, uint8_t* index, int64_t stride) {
  struct Piece {
    int64_t source, target, count;
  } pieces[BinaryTraits::block];
  int many = 0;
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / window.out_width, x = (first + done) % window.out_width;
    const int64_t line = count - done < window.out_width - x ? count - done : window.out_width - x, end = done + line;
    for (int64_t source = y * window.stride[0] * window.width + x * window.stride[1]; done < end;
         done += 32, source += 32 * window.stride[1])
      pieces[many++] = {source, done, end - done};
    done = end;
  }
  for (int64_t i = 0; i < window.kernel[0]; ++i)
    for (int64_t j = 0; j < window.kernel[1]; ++j) {
      const uint8_t* tap = image + i * window.dilation[0] * window.width + j * window.dilation[1];
      for (int64_t c = 0; c < window.channels; c += BinaryTraits::quad, tap += window.plane, index += stride)
        for (int p = 0; p < many; ++p)
          copy_pixels<step>(tap + pieces[p].source, window.stride[1], pieces[p].count, index + pieces[p].target);
    }
}

void gather_index(const uint8_t* image, const BinaryWindow& window, int64_t first, int64_t count, uint8_t* index, int64_t stride) {
  const auto run = window.stride[1] == 1 ? gather_lines<1> : window.stride[1] == 2 ? gather_lines<2> : gather_lines<0>;
  run(image, window, first, count, index, stride);
}

template <int vectors, int panels>
QUANTIZE_INLINE void lookup_tile(const uint8_t* index, int64_t stride, int64_t quads, const uint8_t* nibbles, int32_t* counts) {
  constexpr int wide = BinaryTraits::quad, channels = wide * panels;
  for (int64_t begin = 0; begin < quads; begin += quads_before_overflow) {
    const int64_t end = quads - begin < quads_before_overflow ? quads : begin + quads_before_overflow;
    Register sum[channels][vectors];
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[c][v] = QUANTIZE_WHOLE(setzero)();
#pragma GCC unroll 2
    for (int64_t k = begin; k < end; ++k) {
      Register x[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) std::memcpy(&x[v], index + k * stride + v * bytes_lanes, sizeof x[v]);
#pragma GCC unroll 16
      for (int c = 0; c < channels; ++c) {
        const uint8_t* table = nibble_tables.counts + nibbles[(c / wide * quads + k) * wide + c % wide];
        const Register of_weight = each_quarter(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[c][v] = QUANTIZE_BYTES(add_epi8)(sum[c][v], QUANTIZE_BYTES(shuffle_epi8)(of_weight, x[v]));
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        uint8_t bytes[bytes_lanes];
        std::memcpy(bytes, &sum[c][v], sizeof bytes);
        int32_t* target = counts + c * BinaryTraits::stride + v * bytes_lanes;
        if (begin == 0)
          for (int i = 0; i < bytes_lanes; ++i) target[i] = bytes[i];
        else
          for (int i = 0; i < bytes_lanes; ++i) target[i] += bytes[i];
      }
  }
}

// Columns of 4 x 4 dwords in each half.
QUANTIZE_INLINE void transpose_quads(__m256i v[4]) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
}

// What is left of a block's pixels would leave most of a vector empty: here lanes are up to 16 channels, and x chooses the table. Halves
// are quads k to k + 3 and k + 4 to k + 7.
template <int pixels>
void lookup_few(const uint8_t* index, int64_t stride, int64_t quads, const uint8_t* nibbles, int panels, int32_t* counts) {
  constexpr int64_t wide = BinaryTraits::quad, together = 8, most = 255 / (together / 2 * BinaryTraits::quad) * together;
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t begin = 0; begin < quads; begin += most) {
    const int64_t end = quads - begin < most ? quads : begin + most;
    __m256i sum[pixels];
    for (int p = 0; p < pixels; ++p) sum[p] = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; k += together) {
      const int64_t there = end - k < together ? end - k : together;
      uint8_t codes[4][together * wide], x[pixels][together];
      __m256i w[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {  // panels that are not there are the first one's, and left out
        const uint8_t* panel = nibbles + ((t < panels ? t : 0) * quads + k) * wide;
        if (there < together) {
          for (int64_t i = 0; i < together * wide; ++i) codes[t][i] = i < there * wide ? panel[i] : 0;
          panel = codes[t];
        }
        w[t] = _mm256_and_si256(_mm256_srli_epi16(load_pixels(panel), 4), low);
      }
      transpose_quads(w);
      for (int64_t i = 0; i < together; ++i)
        for (int p = 0; p < pixels; ++p) x[p][i] = i < there ? index[(k + i) * stride + p] : outside_nibble;
      const auto table = [](uint8_t nibble) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(nibble_tables.counts + 16 * nibble));
      };
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int p = 0; p < pixels; ++p) {
          const __m256i of_pixel = _mm256_inserti128_si256(_mm256_castsi128_si256(table(x[p][i])), table(x[p][4 + i]), 1);
          sum[p] = _mm256_add_epi8(sum[p], _mm256_shuffle_epi8(of_pixel, w[i]));
        }
    }
    for (int p = 0; p < pixels; ++p) {
      uint8_t bytes[2][4 * wide];
      std::memcpy(bytes, &sum[p], sizeof bytes);
      for (int c = 0; c < panels * wide; ++c) {
        int32_t& target = counts[c * BinaryTraits::stride + p];
        target = (begin == 0 ? 0 : target) + bytes[0][c] + bytes[1][c];
      }
    }
  }
}

void lookup(const uint8_t* index, int64_t stride, int64_t quads, int64_t count, const uint8_t* nibbles, int panels, int32_t* counts) {
  constexpr int64_t panel_counts = BinaryTraits::quad * BinaryTraits::stride;
  for (int64_t p = 0; p < count;) {
    const int64_t left = count - p;
    if (left <= few_pixels) {
      const auto few = left >= 4 ? lookup_few<4> : left == 3 ? lookup_few<3> : left == 2 ? lookup_few<2> : lookup_few<1>;
      few(index + p, stride, quads, nibbles, panels, counts + p);
      p += left < 4 ? left : 4;
      continue;
    }
    const bool two = left > bytes_lanes;
    int panel = 0;
    if (!two)
      for (; panel + 2 <= panels; panel += 2)
        lookup_tile<1, 2>(index + p, stride, quads, nibbles + panel * quads * BinaryTraits::quad, counts + panel * panel_counts + p);
    for (; panel < panels; ++panel) {
      const auto run = two ? lookup_tile<2, 1> : lookup_tile<1, 1>;
      run(index + p, stride, quads, nibbles + panel * quads * BinaryTraits::quad, counts + panel * panel_counts + p);
    }
    p += two ? 2 * bytes_lanes : bytes_lanes;
  }
}

}  // namespace
}  // namespace quantize::packed
