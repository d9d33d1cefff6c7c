// The image kernels of binary_kernels.h: floats to bits, bits to blocks, counts to outputs. Included by one file per ISA.
#pragma once

#include "binary_bits.h"
#include "binary_words_run.h"

namespace quantize::packed {
namespace {

// Bit `place` where x < threshold, of sixteen numbers.
QUANTIZE_INLINE void add_bits(Lanes x, float threshold, int place, Lanes::Whole bits[Lanes::parts]) {
  for (int i = 0; i < Lanes::parts; ++i) bits[i] |= (x.part[i] < threshold - Lanes::Part{}) & (1 << place);
}

void pack_planes(const float* x, int64_t plane, int64_t channels, const float* threshold, const uint64_t* flips, uint64_t* words) {
  for (int64_t first = 0; first < channels; first += 64)
    for (int64_t p = 0; p < plane; p += lanes) {
      const int64_t count = plane - p < lanes ? plane - p : lanes;
      uint32_t halves[2][lanes];
      for (int half = 0; half < 2; ++half) {
        const int64_t begin = first + 32 * half, left = channels - begin;
        Lanes::Whole bits[Lanes::parts] = {};
        const int many = left < 32 ? int(left) : 32;
        if (count == lanes)
          for (int c = 0; c < many; ++c) add_bits(load_lanes(x + (begin + c) * plane + p), threshold ? threshold[begin + c] : 0.f, c, bits);
        else
          for (int c = 0; c < many; ++c) add_bits(load_part(x + (begin + c) * plane + p, count), threshold ? threshold[begin + c] : 0.f, c, bits);
        std::memcpy(halves[half], bits, sizeof bits);
      }
      uint64_t joined[lanes];
      const uint64_t flip = flips[first / 64];
      for (int l = 0; l < lanes; ++l) joined[l] = (halves[0][l] | uint64_t(halves[1][l]) << 32) ^ flip;
      std::memcpy(words + first / 64 * plane + p, joined, size_t(count) * 8);
    }
}

// The sixteen bits of x < threshold.
QUANTIZE_INLINE uint64_t row_bits(Lanes x, Lanes threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x.part[0], (__m512)threshold.part[0], _CMP_LT_OQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_ps((__m256)(x.part[0] < threshold.part[0]))) |
         unsigned(_mm256_movemask_ps((__m256)(x.part[1] < threshold.part[1]))) << 8;
#else
  uint64_t bits = 0;
  for (int i = 0; i < Lanes::parts; ++i) {
    const Lanes::Whole one = (x.part[i] < threshold.part[i]) & Lanes::Whole{1, 2, 4, 8};
    bits |= uint64_t(one[0] | one[1] | one[2] | one[3]) << (i * Lanes::width);
  }
  return bits;
#endif
}

void pack_rows(const float* x, int64_t pixel, int64_t channels, int64_t pixels, const float* threshold, const uint64_t* flips,
               uint64_t* words, int64_t plane) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t first = 0; first < channels; first += 64) {
      uint64_t word = 0;
      for (int64_t c = first; c < channels && c < first + 64; c += lanes) {
        const int64_t count = channels - c;
        const uint64_t bits = row_bits(load_part(x + p * pixel + c, count), threshold ? load_part(threshold + c, count) : Lanes(0.f));
        word |= (count < lanes ? bits & ((1u << count) - 1) : bits) << (c - first);
      }
      words[first / 64 * plane + p] = word ^ flips[first / 64];
    }
}

// One word of a tap: target = source, or target |= part of it. Writes whole vectors, behind `count` too: what stands there is written
// later, by the next line's first word at this place. A step of one is a copy.
enum class Put { all, low, high };
template <Put put>
QUANTIZE_INLINE void put_line(const uint64_t* source, int64_t step, int64_t count, uint64_t trim, int shift, uint64_t* target) {
  for (int64_t i = 0; i < count; i += word_lanes) {
    Words v;
    if (step == 1)
      v = load_words(source + i);
    else
      for (int l = 0; l < word_lanes; ++l) v[l] = i + l < count ? source[(i + l) * step] : 0;
    if (put == Put::low) v = load_words(target + i) | (v & trim) << shift;
    if (put == Put::high) v = (v & trim) >> shift;
    std::memcpy(target + i, &v, sizeof v);
  }
}

void gather(const uint64_t* image, int64_t image_plane, const BinaryWindow& window, int64_t first, int64_t count, uint64_t* x) {
  constexpr int64_t row = BinaryTraits::stride;
  for (int64_t done = 0; done < count;) {  // line by line of the output, so that what a line writes too much the next one mends
    const int64_t y = (first + done) / window.out_width, column = (first + done) % window.out_width;
    const int64_t line = count - done < window.out_width - column ? count - done : window.out_width - column, step = window.stride[1];
    int64_t bit = 0;
    for (int64_t i = 0; i < window.kernel[0]; ++i)
      for (int64_t j = 0; j < window.kernel[1]; ++j) {
        const uint64_t* source =
            image + (y * window.stride[0] + i * window.dilation[0]) * window.width + column * step + j * window.dilation[1];
        for (int64_t c = 0; c < window.channels; c += 64, source += image_plane) {
          const int64_t left = window.channels - c;
          const int bits = left < 64 ? int(left) : 64, shift = int(bit % 64);
          const uint64_t trim = bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
          uint64_t* target = x + bit / 64 * row + done;
          if (shift == 0)
            bits == 64 ? put_line<Put::all>(source, step, line, trim, 0, target) : put_line<Put::high>(source, step, line, trim, 0, target);
          else {
            put_line<Put::low>(source, step, line, trim, shift, target);
            if (shift + bits > 64) put_line<Put::high>(source, step, line, trim, 64 - shift, target + row);
          }
          bit += bits;
        }
      }
    done += line;
  }
}

void finish_floats(const int32_t* __restrict counts, int channels, int64_t count, BinaryFinish finish, const float* __restrict scale,
                   const float* __restrict bias, float* __restrict out, int64_t channel_stride, int64_t pixel_stride) {
  constexpr int64_t row = BinaryTraits::stride;
  const int32_t* __restrict base = finish.base;
  if (pixel_stride == 1) {
    for (int c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i)
        out[c * channel_stride + i] = binary_value(finish.slope * counts[c * row + i] + (base[i] + finish.shift[c]), scale[c], bias[c]);
    return;
  }
  for (int c = 0; c < channels; ++c)
    for (int64_t i = 0; i < count; ++i)
      out[c * channel_stride + i * pixel_stride] =
          binary_value(finish.slope * counts[c * row + i] + (base[i] + finish.shift[c]), scale[c], bias[c]);
}

void finish_bits(const int32_t* __restrict counts, int channels, int64_t count, BinaryFinish finish, const int32_t* __restrict threshold,
                 uint16_t* __restrict bits) {
  constexpr int64_t row = BinaryTraits::stride;
  int32_t collected[BinaryTraits::block] = {};
  for (int c = 0; c < channels; ++c)
    for (int64_t i = 0; i < count; ++i)
      collected[i] |= (finish.slope * counts[c * row + i] + (finish.base[i] + finish.shift[c]) < threshold[c] ? 1 : 0) << c;
  for (int64_t i = 0; i < count; ++i) bits[i] = uint16_t(collected[i]);
}

}  // namespace
}  // namespace quantize::packed
