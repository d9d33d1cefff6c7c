// The body of image_kernels.h, included by one file per ISA.
#pragma once

#include "image_kernels.h"
#include "level_codes.h"

#ifdef __AVX512F__
#include "../core/transpose_avx512.h"
#endif

namespace quantize::packed {
namespace {

void from_planes(const float* x, int64_t plane, int64_t channels, int64_t height, int64_t width, LsqRange range, uint8_t* image,
                 int64_t line_bytes, int64_t pixel_bytes) {
  const float* end = x + channels * plane;  // what is loaded behind a line's end is not stored
  for (int64_t h = 0; h < height; ++h)
    for (int64_t c = 0; c < channels; c += 4)
      for (int64_t w = 0; w < width; w += lanes) {
        const int64_t count = width - w < lanes ? width - w : lanes;
        Lanes::Whole dwords[Lanes::parts] = {};
        for (int j = 0; j < 4 && c + j < channels; ++j) {
          Lanes::Whole codes[Lanes::parts];
          const float* from = x + (c + j) * plane + h * width + w;
          codes_of(load_part(from, end - from), range, int32_t(-range.low), codes);
          for (int i = 0; i < Lanes::parts; ++i) dwords[i] |= codes[i] << (8 * j);
        }
        int32_t values[lanes];
        std::memcpy(values, dwords, sizeof values);
        uint8_t* target = image + h * line_bytes + w * pixel_bytes + c;
        for (int64_t l = 0; l < count; ++l) std::memcpy(target + l * pixel_bytes, values + l, 4);
      }
}

// Pixels of few channels, several of them in a vector.
void from_short_pixels(const float* x, int64_t channels, int64_t pixels, LsqRange range, int32_t zero_point, uint8_t* image,
                       int64_t pixel_bytes) {
  constexpr int64_t block = 32;
  uint8_t bytes[block * lanes];
  for (int64_t first = 0; first < pixels; first += block) {
    const int64_t count = pixels - first < block ? pixels - first : block, n = count * channels;
    for (int64_t i = 0; i < n; i += lanes) store_codes(load_part(x + first * channels + i, n - i), range, zero_point, bytes + i);
    for (int64_t p = 0; p < count; ++p) store_words(bytes + p * channels, channels, image + (first + p) * pixel_bytes);
  }
}

void from_rows(const float* x, int64_t pixel, int64_t channels, int64_t pixels, LsqRange range, int32_t zero_point, uint8_t* image,
               int64_t pixel_bytes) {
  if (pixel == channels && channels < lanes) return from_short_pixels(x, channels, pixels, range, zero_point, image, pixel_bytes);
  const float* end = x + (pixels - 1) * pixel + channels;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += lanes) {
      uint8_t bytes[lanes];
      const float* from = x + p * pixel + c;
      store_codes(load_part(from, end - from), range, zero_point, bytes);
      uint8_t* target = image + p * pixel_bytes + c;
      if (channels - c >= lanes)
        std::memcpy(target, bytes, lanes);
      else
        store_words(bytes, channels - c, target);
    }
}

#ifdef __AVX512F__
// Blocks of 16 by 16, turned.
void finish_planes(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction, const float* gain,
                   const float* bias, const float* residual, float* out, int64_t plane) {
  for (int64_t c = 0; c < columns; c += 16)
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t some = rows - r < 16 ? rows - r : 16, channels = columns - c < 16 ? columns - c : 16;
      const __mmask16 there = __mmask16((1u << some) - 1), wanted = __mmask16((1u << channels) - 1);
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = i < some ? _mm512_maskz_loadu_epi32(wanted, acc + (r + i) * stride + c) : _mm512_setzero_si512();
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i >= channels) break;
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(v[i], _mm512_set1_epi32(correction[c + i])));
        const int64_t at = (c + i) * plane + r;
        __m512 y = _mm512_add_ps(_mm512_mul_ps(sum, _mm512_set1_ps(gain[c + i])), _mm512_set1_ps(bias[c + i]));
        if (residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, residual + at));
        _mm512_mask_storeu_ps(out + at, there, y);
      }
    }
}
#endif

void finish(const int32_t* __restrict acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* __restrict correction,
            const float* __restrict gain, const float* __restrict bias, const float* __restrict residual, float* __restrict out,
            int64_t row_stride, int64_t column_stride) {
  if (column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) out[i * row_stride + c] = float(acc[i * stride + c] - correction[c]) * gain[c] + bias[c];
    for (int64_t i = 0; residual && i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) out[i * row_stride + c] += residual[i * row_stride + c];
    return;
  }
#ifdef __AVX512F__
  if (row_stride == 1) return finish_planes(acc, stride, rows, columns, correction, gain, bias, residual, out, column_stride);
#endif
  for (int64_t c = 0; c < columns; ++c) {
    float* __restrict line = out + c * column_stride;
    for (int64_t i = 0; i < rows; ++i) line[i * row_stride] = float(acc[i * stride + c] - correction[c]) * gain[c] + bias[c];
    for (int64_t i = 0; residual && i < rows; ++i) line[i * row_stride] += residual[c * column_stride + i * row_stride];
  }
}

// Sixteen numbers, or the first `count`.
QUANTIZE_INLINE void load_whole(const int32_t* p, int64_t count, Lanes::Whole out[Lanes::parts]) {
  int32_t rest[lanes];
  if (count < lanes) {
    for (int l = 0; l < lanes; ++l) rest[l] = l < count ? p[l] : 0;
    p = rest;
  }
  for (int i = 0; i < Lanes::parts; ++i) std::memcpy(&out[i], p + i * Lanes::width, sizeof out[i]);
}

// store(v, row, channel, how many channels there are from it on).
template <typename Store>
QUANTIZE_INLINE void finish_rows(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction,
                                 const float* gain, const float* bias, const Store& store) {
  for (int64_t c = 0; c < columns; c += lanes) {
    const int64_t count = columns - c;
    Lanes::Whole less[Lanes::parts];
    load_whole(correction + c, count, less);
    const Lanes scale = load_part(gain + c, count), shift = load_part(bias + c, count);
    for (int64_t i = 0; i < rows; ++i) {
      Lanes::Whole sums[Lanes::parts];
      load_whole(acc + i * stride + c, count, sums);
      Lanes v;
      for (int p = 0; p < Lanes::parts; ++p) v.part[p] = __builtin_convertvector(sums[p] - less[p], Lanes::Part);
      store(v * scale + shift, i, c, count);
    }
  }
}

void finish_codes(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction, const float* gain,
                  const float* bias, LsqRange range, int32_t zero_point, uint8_t* image, int64_t pixel_bytes) {
  finish_rows(
      acc, stride, rows, columns, correction, gain, bias, [&](Lanes v, int64_t i, int64_t c, int64_t count) __attribute__((always_inline)) {
        uint8_t bytes[lanes];
        store_codes(v, range, zero_point, bytes);
        uint8_t* target = image + i * pixel_bytes + c;
        if (count >= lanes)
          std::memcpy(target, bytes, lanes);
        else
          store_words(bytes, count, target);
      });
}

// NaN stays.
QUANTIZE_INLINE Lanes clipped(Lanes v, float low, float high) {
  for (Lanes::Part& p : v.part) p = p < low ? Lanes::Part{} + low : p;
  for (Lanes::Part& p : v.part) p = p > high ? Lanes::Part{} + high : p;
  return v;
}

void finish_clipped(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction, const float* gain,
                    const float* bias, const float* residual, float low, float high, float* out, int64_t row_stride) {
  const auto store = [&](Lanes v, int64_t i, int64_t c, int64_t count) __attribute__((always_inline)) {
    store_part(clipped(v, low, high), reinterpret_cast<F32*>(out + i * row_stride + c), count);
  };
  if (!residual) return finish_rows(acc, stride, rows, columns, correction, gain, bias, store);
  finish_rows(
      acc, stride, rows, columns, correction, gain, bias, [&](Lanes v, int64_t i, int64_t c, int64_t count) __attribute__((always_inline)) {
        store(v + load_part(residual + i * row_stride + c, count), i, c, count);
      });
}

void add_and_clip(float* out, const float* residual, int64_t lines, int64_t stride, int64_t length, float low, float high) {
  for (int64_t line = 0; line < lines; ++line, out += stride) {
    const float* more = residual ? residual + line * stride : nullptr;
    for (int64_t i = 0; i < length; i += lanes) {
      Lanes v = load_part(out + i, length - i);
      if (more) v += load_part(more + i, length - i);
      store_part(clipped(v, low, high), reinterpret_cast<F32*>(out + i), length - i);
    }
  }
}

constexpr ImageKernels image_of_isa{from_planes, from_rows, finish, finish_codes, finish_clipped, add_and_clip};

}  // namespace
}  // namespace quantize::packed
