// One call of a binary layer on the CPU: what the ops check and binary_layer.cpp runs.
#pragma once

#include "binary_kernels.h"

namespace quantize::packed {

struct BinaryLayer {
  // The input: floats, channels apart by planes or together (`rows`); or bits [N, H, W, 8 * ceil(channels / 64)].
  const float* floats = nullptr;
  const uint8_t* bits = nullptr;
  bool rows = false;
  int64_t skip[2] = {1, 1};          // of rows: only every so many-th line and pixel is read, and height and width count those
  int64_t sample = 0, line = 0;      // floats of a sample, and of one of its lines where they lie by rows
  const float* threshold = nullptr;  // [channels]; null: 0
  const uint8_t* flip = nullptr;     // [channels]; null: 0
  bool unit = false;

  int64_t batch, channels, height, width, out_channels, out_height, out_width;
  int64_t groups = 1, padding[2] = {0, 0};
  BinaryWindow window;

  const uint8_t *codes, *panels;  // quantize/packed/binary_panels.py
  const int32_t* sums;            // [taps, out_channels]
  const float* scales;
  const float* bias = nullptr;  // null: 0

  // The output: floats in the layout of `rows`, or bits [N, OH, OW, 8 * ceil(out_channels / 64)], which come zeroed.
  float* out = nullptr;
  const float* residual = nullptr;  // as `out` lies, and added to it
  uint8_t* out_bits = nullptr;
  const int32_t* next_threshold = nullptr;
  const uint8_t* next_flip = nullptr;  // null: 0

  int64_t taps() const { return window.kernel[0] * window.kernel[1]; }
  int64_t length() const { return taps() * window.channels; }
  int64_t words() const { return (length() + 63) / 64; }
  int64_t quads() const { return (length() + BinaryTraits::quad - 1) / BinaryTraits::quad; }
  int64_t planes() const { return (window.channels + 63) / 64; }  // of a group's image
  int64_t group_outputs() const { return out_channels / groups; }
  bool padded() const { return padding[0] || padding[1]; }
};

void run_binary(const BinaryLayer& layer);

}  // namespace quantize::packed
