// CPU kernels of depthwise convolutions of levels, in float32: whole numbers below 2^24, which it holds, so that sums are exact in any
// order and fused or not. Torch-free.
//
// The pixels that are read are made levels, zeros around them, and taken apart by strides (Units): what the same tap of neighbouring
// windows reads lies together, so that sixteen sums are a vector's. Sixteen neighbours in a plane; or sixteen channels of a pixel, of which
// a chunk is as long as a row has pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/cpu_isa.h"
#include "../weight/lsq.h"

namespace quantize::packed {

using weight::LsqRange;

struct DepthwiseTraits {
  static constexpr int64_t lanes = 16;
  static constexpr int64_t most_taps = (int64_t(1) << 24) / (255 * 127);  // of codes to 255 and levels to 127
};

// The input's pixels that `rows` rows of the output read, taken apart by strides: [row phase][column phase][row][column], behind each
// column phase room for what vectors touch beyond.
struct Units {
  int64_t size[2];  // of the input
  int64_t padding[2], stride[2];
  int64_t extent[2];  // pixels that are read, padding included
  int64_t phases[2], each[2];

  Units(const int64_t input[2], const int64_t output[2], const int64_t* kernel, const int64_t* steps, const int64_t* around,
        const int64_t* dilation, int64_t rows) {
    for (int d = 0; d < 2; ++d) {
      size[d] = input[d], padding[d] = around[d], stride[d] = steps[d];
      extent[d] = ((d ? output[1] : rows) - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1;
      phases[d] = std::min(stride[d], extent[d]), each[d] = (extent[d] - 1) / stride[d] + 1;
    }
  }

  int64_t pitch() const { return each[1]; }  // from a row of the output to the next
  int64_t count() const { return phases[0] * phases[1] * (each[0] * each[1] + DepthwiseTraits::lanes); }
  // The first unit of a row, among those of a column phase.
  int64_t row(int64_t phase, int64_t column_phase, int64_t index) const {
    return (phase * phases[1] + column_phase) * (each[0] * each[1] + DepthwiseTraits::lanes) + index * each[1];
  }
  // Floats of a row of pixels of sixteen channels.
  int64_t chunk() const { return phases[1] * each[1] * DepthwiseTraits::lanes; }
  // Where the window of output pixel 0 reads pixel (r, c) of a plane, and column c of such a row.
  int64_t at(int64_t r, int64_t c) const { return row(r % stride[0], c % stride[1], r / stride[0]) + c / stride[1]; }
  int64_t at(int64_t c) const { return (c % stride[1] * each[1] + c / stride[1]) * DepthwiseTraits::lanes; }
};

struct DepthwiseKernels {
  // Levels of a plane, from output row `first` on. buffer: units.count() floats; line: units.extent[1] + lanes floats of scratch.
  void (*fill_plane)(const float* x, const Units& units, int64_t first, LsqRange range, float* buffer, float* line);
  // Levels of a row of pixels, `pixel` floats apart; end: of what may be read; x null: of a row of padding. buffer: [chunks of sixteen of
  // `channels`][units.chunk()].
  void (*fill_row)(const float* x, const float* end, int64_t pixel, int64_t channels, const Units& units, LsqRange range, float* buffer);
  // The same of codes, `zero_point` above the levels.
  void (*fill_row_of_codes)(const uint8_t* x, const uint8_t* end, int64_t pixel, int64_t channels, const Units& units, float zero_point,
                            float* buffer);
  // out[i] = sum_t x[i * lanes + offsets[t]] * weights[t] * gain + bias, vectors of sixteen, `count` of whose lanes are stored, `stride`
  // floats apart. weights: of each tap sixteen, weight_pitch floats apart; gain, bias: [lanes].
  void (*sum)(const float* x, int64_t vectors, const int64_t* offsets, int64_t taps, const float* weights, int64_t weight_pitch,
              const float* gain, const float* bias, float* out, int64_t stride, int64_t count);
  // The same as codes, zero_point above the levels: pixels of `stride` bytes, `count` of which are stored, rounded up to 4.
  void (*sum_codes)(const float* x, int64_t vectors, const int64_t* offsets, int64_t taps, const float* weights, int64_t weight_pitch,
                    const float* gain, const float* bias, LsqRange range, int32_t zero_point, uint8_t* out, int64_t stride, int64_t count);
  // Rows of `width` floats, `pitch` floats apart, to rows that lie together. Reads lanes - 1 floats beyond the last.
  void (*copy_rows)(const float* from, int64_t pitch, int64_t rows, int64_t width, float* to);
};

extern const DepthwiseKernels depthwise_portable, depthwise_avx2, depthwise_avx512;

inline const DepthwiseKernels& depthwise_kernels() { return QUANTIZE_BY_ISA(cpu_isa(), depthwise); }

}  // namespace quantize::packed
