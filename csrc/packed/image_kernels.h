// Activations on their way into the integer products and out of them: one body, compiled once per ISA. Torch-free.
#pragma once

#include "../core/cpu_isa.h"
#include "../weight/lsq.h"

namespace quantize::packed {

using weight::LsqRange;

struct ImageKernels {
  // Codes of `height` x `width` pixels, channel by channel (x: planes of `plane` elements), to image[pixel][pixel_bytes]; a line of pixels
  // starts every line_bytes. Writes channels rounded up to 4.
  void (*from_planes)(const float* x, int64_t plane, int64_t channels, int64_t height, int64_t width, LsqRange range, uint8_t* image,
                      int64_t line_bytes, int64_t pixel_bytes);
  // Codes of one line of pixels whose channels lie together, a pixel every `pixel` elements. Writes channels rounded up to 4. Codes are
  // zero_point above the levels: -range.low, unless the ends of the range are narrower.
  void (*from_rows)(const float* x, int64_t pixel, int64_t channels, int64_t pixels, LsqRange range, int32_t zero_point, uint8_t* image,
                    int64_t pixel_bytes);
  // out[i][c] = float(acc[i][c] - correction[c]) * gain[c] + bias[c], and residual, if any, which lies as out does; acc's rows hold
  // `stride` sums, out has strides of its own.
  void (*finish)(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction, const float* gain,
                 const float* bias, const float* residual, float* out, int64_t row_stride, int64_t column_stride);
  // The same as codes: as from_rows, of pixels [rows][pixel_bytes].
  void (*finish_codes)(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction, const float* gain,
                       const float* bias, LsqRange range, int32_t zero_point, uint8_t* image, int64_t pixel_bytes);
  // The same as floats to which residual, if any, is added, and which are clipped: rows of `row_stride` floats, the residual's too.
  void (*finish_clipped)(const int32_t* acc, int64_t stride, int64_t rows, int64_t columns, const int32_t* correction, const float* gain,
                         const float* bias, const float* residual, float low, float high, float* out, int64_t row_stride);
  // Lines of `length` floats, `stride` floats apart: residual, if any, which lies as they do, is added, and then they are clipped. NaN
  // stays.
  void (*add_and_clip)(float* out, const float* residual, int64_t lines, int64_t stride, int64_t length, float low, float high);
};

extern const ImageKernels image_portable, image_avx2, image_avx512;

inline const ImageKernels& image_kernels() { return QUANTIZE_BY_ISA(cpu_isa(), image); }

}  // namespace quantize::packed
