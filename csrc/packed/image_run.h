// The body of image_kernels.h, included by one file per ISA.
#pragma once

#include "image_kernels.h"
#include "level_codes.h"

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
          codes_of(load_part(from, end - from), range, codes);
          for (int i = 0; i < Lanes::parts; ++i) dwords[i] |= codes[i] << (8 * j);
        }
        int32_t values[lanes];
        std::memcpy(values, dwords, sizeof values);
        uint8_t* target = image + h * line_bytes + w * pixel_bytes + c;
        for (int64_t l = 0; l < count; ++l) std::memcpy(target + l * pixel_bytes, values + l, 4);
      }
}

// Sixteen codes as bytes.
QUANTIZE_INLINE void store_codes(Lanes x, LsqRange range, uint8_t* bytes) {
  using Bytes = uint8_t __attribute__((vector_size(Lanes::width)));
  Lanes::Whole codes[Lanes::parts];
  codes_of(x, range, codes);
  for (int i = 0; i < Lanes::parts; ++i) {
    const Bytes own = __builtin_convertvector(codes[i], Bytes);
    std::memcpy(bytes + i * Lanes::width, &own, sizeof own);
  }
}

// `channels` bytes, in words; zeros fill the last one.
QUANTIZE_INLINE void store_words(const uint8_t* bytes, int64_t channels, uint8_t* target) {
  uint32_t word;
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) std::memcpy(target + c, bytes + c, 4);
  if (c == channels) return;
  std::memcpy(&word, bytes + c, 4);
  word &= (1u << (8 * (channels - c))) - 1;
  std::memcpy(target + c, &word, 4);
}

// Pixels of few channels, several of them in a vector.
void from_short_pixels(const float* x, int64_t channels, int64_t pixels, LsqRange range, uint8_t* image, int64_t pixel_bytes) {
  constexpr int64_t block = 32;
  uint8_t bytes[block * lanes];
  for (int64_t first = 0; first < pixels; first += block) {
    const int64_t count = pixels - first < block ? pixels - first : block, n = count * channels;
    for (int64_t i = 0; i < n; i += lanes) store_codes(load_part(x + first * channels + i, n - i), range, bytes + i);
    for (int64_t p = 0; p < count; ++p) store_words(bytes + p * channels, channels, image + (first + p) * pixel_bytes);
  }
}

void from_rows(const float* x, int64_t pixel, int64_t channels, int64_t pixels, LsqRange range, uint8_t* image, int64_t pixel_bytes) {
  if (pixel == channels && channels < lanes) return from_short_pixels(x, channels, pixels, range, image, pixel_bytes);
  const float* end = x + (pixels - 1) * pixel + channels;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += lanes) {
      uint8_t bytes[lanes];
      const float* from = x + p * pixel + c;
      store_codes(load_part(from, end - from), range, bytes);
      uint8_t* target = image + p * pixel_bytes + c;
      if (channels - c >= lanes)
        std::memcpy(target, bytes, lanes);
      else
        store_words(bytes, channels - c, target);
    }
}

void finish(const int32_t* __restrict acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* __restrict correction,
            const float* __restrict gain, const float* __restrict bias, float* __restrict out, int64_t row_stride, int64_t column_stride) {
  if (column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) out[i * row_stride + c] = float(acc[i * stride + c] - correction[c]) * gain[c] + bias[c];
    return;
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t i = 0; i < rows; ++i)
      out[i * row_stride + c * column_stride] = float(acc[i * stride + c] - correction[c]) * gain[c] + bias[c];
}

constexpr ImageKernels image_of_isa{from_planes, from_rows, finish};

}  // namespace
}  // namespace quantize::packed
