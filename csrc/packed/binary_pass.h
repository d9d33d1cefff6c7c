// What both ways through a binary layer on the CPU share: bits of the input, and bits and residuals of the output.
#pragma once

#include <cstring>
#include <vector>

#include "binary_layer.h"

namespace quantize::packed {

// What a call prepares for all its blocks. Kept by the thread that calls, but for large images.
struct BinaryPrepared {
  std::vector<uint64_t> flips, images;
  std::vector<uint8_t> nibbles;           // images for lookups, or of bytes
  std::vector<int32_t> shift, inside[2];  // inside: how many of a kernel's lines (columns) meet the image, or which
  std::vector<int32_t> starts, offsets;   // binary_layer_columns.cpp
  std::vector<float> bias;
};

inline uint64_t word_at(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

class BinaryPass {
 public:
  // Prepares what is known of channels: flips, shift and bias.
  BinaryPass(const BinaryLayer& layer, BinaryPrepared& prepared);

 protected:
  const float* threshold(int64_t channel) const { return l_.threshold ? l_.threshold + channel : nullptr; }
  const float* bias(int64_t channel) const { return (l_.bias ? l_.bias : p_.bias.data()) + channel; }
  // A group's words of 64 channels, pixel by pixel.
  void pack(int64_t sample, int64_t group, int64_t plane, uint64_t* words) const;
  // Up to 16 channels' bits of each pixel into its words.
  void store_bits(const uint16_t* bits, int64_t channel, int many, int64_t count, int64_t pixel) const;
  // Of a block of the output and of what is added to it: it comes while the products are made. In so many pieces the machine does not see
  // it coming.
  void prefetch(const float* out, int64_t pixels, int64_t channels) const;
  // To a block of the output that was just written and is still in the cache.
  void add_residual(float* out, int64_t pixels, int64_t channels) const;

  const BinaryLayer& l_;
  BinaryPrepared& p_;
  const BinaryKernels& kernels_;
};

// Layers whose integer products in tiles are sooner done than popcounts.
bool fits_tiles(const BinaryLayer& layer);
void run_binary_tiles(const BinaryLayer& layer, BinaryPrepared& prepared);

// Layers whose weights are sooner multiplied column by column.
bool fits_columns(const BinaryLayer& layer);
void run_binary_columns(const BinaryLayer& layer, BinaryPrepared& prepared);

}  // namespace quantize::packed
