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

void from_rows(const float* x, int64_t pixel, int64_t channels, int64_t pixels, LsqRange range, uint8_t* image, int64_t pixel_bytes) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += lanes) {
      Lanes::Whole codes[Lanes::parts];
      codes_of(load_part(x + p * pixel + c, channels - c), range, codes);
      int32_t values[lanes];
      std::memcpy(values, codes, sizeof values);
      uint8_t bytes[lanes];
      for (int l = 0; l < lanes; ++l) bytes[l] = uint8_t(values[l]);
      uint8_t* target = image + p * pixel_bytes + c;
      if (channels - c >= lanes)
        std::memcpy(target, bytes, lanes);
      else
        std::memcpy(target, bytes, size_t(channels - c));
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
