// Binary layers on the device: what its kernels share, packing, and the kernels that need no tensor cores. Arithmetic: binary_bits.h.
//
// The input becomes an image of bits, the layout that binary layers hand each other: a pixel is 2 * ceil(C / 64) words of 32 channels. Then
//
//   tiles    implicit GEMM on tensor cores (binary_tiles.cuh): whole images, wherever channels fill a good part of a tile
//   rows     a few rows of a linear layer, each row of codes read once, 8 or 16 bytes a lane
//   direct   an output a lane, from codes as they lie: groups of few channels, depthwise and narrow layers
#pragma once

#include <bit>

#include "../core/divider.h"
#include "../core/grid.h"
#include "../core/warp.cuh"
#include "binary_bits.h"

namespace quantize::packed {

struct DeviceBinary {
  static constexpr int threads = 256, warps = threads / Warp::lanes, blocks = 8;  // blocks: of a multiprocessor
  static constexpr int words_at_once = 8;                                         // of a warp that packs rows: a sector of 32 bytes
  static constexpr int most_rows = 8;                                             // that go through the codes together
  static constexpr int most_grid_rows = 65535;                                    // CUDA's gridDim.y
  static constexpr int channels_of_warp = 4;                                      // whose codes are in flight together
  static_assert(warps * channels_of_warp == 32);                                  // a block makes whole words of outputs
};

// A layer and its memory. A linear layer is a convolution of images of one pixel. Everything is less than 2^30 bits, pixels or outputs
// wide, and images of bits have less than 2^31 words.
struct BinaryCall {
  int batch, channels, height = 1, width = 1, out_channels, out_height = 1, out_width = 1, groups = 1;
  int kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};  // of height and width
  bool unit = false;
  bool together = false;             // the channels of a pixel of floats: [N, H, W, C], not [N, C, H, W]
  const float* floats = nullptr;     // the input; null where `image` is
  const float* threshold = nullptr;  // [channels]; null: 0
  const uint8_t* flip = nullptr;     // [channels]; null: 0
  const uint32_t* image = nullptr;   // [pixels, pixel_words]
  const uint32_t* codes;             // [out_channels, code_words]
  const int32_t* sums;               // [taps, out_channels]
  const float* scales;
  const float* bias = nullptr;              // null: 0
  float* out = nullptr;                     // floats, laid out as `together` says
  const float* residual = nullptr;          // added to them; null: nothing
  uint32_t* out_bits = nullptr;             // or [out pixels, out_words]
  const int32_t* next_threshold = nullptr;  // [out_channels]
  const uint8_t* next_flip = nullptr;       // [out_channels]; null: 0

  QUANTIZE_HOST_DEVICE static int words_of(int64_t bits) { return int((bits + 63) / 64 * 2); }
  QUANTIZE_HOST_DEVICE int pixel_words() const { return words_of(channels); }
  QUANTIZE_HOST_DEVICE int out_words() const { return words_of(out_channels); }
  QUANTIZE_HOST_DEVICE int inputs() const { return channels / groups; }
  QUANTIZE_HOST_DEVICE int outputs() const { return out_channels / groups; }
  QUANTIZE_HOST_DEVICE int taps() const { return kernel[0] * kernel[1]; }
  QUANTIZE_HOST_DEVICE int length() const { return taps() * inputs(); }
  QUANTIZE_HOST_DEVICE int code_words() const { return words_of(length()); }
  QUANTIZE_HOST_DEVICE bool padded() const { return padding[0] > 0 || padding[1] > 0; }
  int64_t pixels() const { return int64_t(batch) * height * width; }
  QUANTIZE_HOST_DEVICE int out_pixels() const { return out_height * out_width; }
  QUANTIZE_HOST_DEVICE int64_t out_rows() const { return int64_t(batch) * out_height * out_width; }  // as a matrix
};

QUANTIZE_DEVICE int32_t popcount(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return std::popcount(x);
#endif
}

// 32 of a row of bits from any one on; zeros from `end` on.
QUANTIZE_DEVICE uint32_t bits_at(const uint32_t* row, int first, int end) {
  const int word = first / 32, shift = first % 32, left = end - first;
  uint32_t v = row[word] >> shift;
  if (shift && (word + 1) * 32 < end) v |= row[word + 1] << (32 - shift);
  return left < 32 ? v & ((1u << left) - 1) : v;
}

// ---- Outputs.

QUANTIZE_DEVICE void store_value(const BinaryCall& c, int64_t at, int n, int32_t dot) {
  const float value = binary_value(dot, c.scales[n], c.bias ? c.bias[n] : 0.f);
  c.out[at] = c.residual ? value + c.residual[at] : value;
}

QUANTIZE_DEVICE bool next_bit(const BinaryCall& c, int n, int32_t dot) {
  return binary_next_bit(dot, c.next_threshold[n], c.next_flip && (c.next_flip[n] & 1));
}

// 32 channels of a pixel, one a lane. All of the warp come here.
QUANTIZE_DEVICE void store_word(const BinaryCall& c, int64_t row, int word, int32_t dot) {
  const int lane = threadIdx.x % Warp::lanes, n = word * 32 + lane;
  if (c.out) {
    if (n < c.out_channels) store_value(c, row * c.out_channels + n, n, dot);
    return;
  }
  const uint32_t bits = __ballot_sync(Warp::all, n < c.out_channels && next_bit(c, n, dot));
  if (lane == 0) c.out_bits[row * c.out_words() + word] = bits;
}

// ---- Packing.

// Planes: a lane a pixel, blockIdx.y the word, or several where there are more words than a grid may have rows.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceBinary::threads)
    pack_binary_planes(BinaryCall c, Divider plane, int pixels, uint32_t* image) {
  const int words = c.pixel_words(), step = gridDim.x * blockDim.x;
  for (int at = blockIdx.y; at < words; at += gridDim.y) {
    const int first = at * 32, many = std::min(32, c.channels - first);
    for (int pixel = blockIdx.x * blockDim.x + threadIdx.x; pixel < pixels; pixel += step) {
      const int sample = plane.quotient(pixel);
      const float* x = c.floats + (int64_t(sample) * c.channels + first) * plane.divisor + (pixel - sample * plane.divisor);
      uint32_t word = 0;
      const auto take = [&](int i, float value) {
        const bool flip = c.flip && (c.flip[first + i] & 1);
        word |= uint32_t(binary_bit(value, c.threshold ? c.threshold[first + i] : 0.f, flip)) << i;
      };
      if (many == 32) {  // all loads before the first use
        float values[32];
#pragma unroll
        for (int i = 0; i < 32; ++i) values[i] = x[int64_t(i) * plane.divisor];
#pragma unroll
        for (int i = 0; i < 32; ++i) take(i, values[i]);
      } else {
        for (int i = 0; i < many; ++i) take(i, x[int64_t(i) * plane.divisor]);
      }
      image[int64_t(pixel) * words + at] = word;
    }
  }
}

// Channels together: a lane a channel, a warp a few words that lie together. row_words: pixel_words(). words: of the image.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceBinary::threads)
    pack_binary_rows(BinaryCall c, Divider row_words, int words, uint32_t* image) {
  constexpr int some = DeviceBinary::words_at_once;
  const int lane = threadIdx.x % Warp::lanes, step = gridDim.x * DeviceBinary::warps * some;
  for (int first = (blockIdx.x * DeviceBinary::warps + threadIdx.x / Warp::lanes) * some; first < words; first += step) {
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < some; ++i) {  // words beyond the last are packed as the last, and not stored
      const int word = std::min(first + i, words - 1), pixel = row_words.quotient(word);
      const int channel = (word - pixel * int(row_words.divisor)) * 32 + lane;
      bool bit = false;
      if (channel < c.channels)
        bit = binary_bit(c.floats[int64_t(pixel) * c.channels + channel], c.threshold ? c.threshold[channel] : 0.f,
                         c.flip && (c.flip[channel] & 1));
      const uint32_t bits = __ballot_sync(Warp::all, bit);
      if (lane == i) mine = bits;
    }
    if (lane < some && first + lane < words) image[first + lane] = mine;
  }
}

// ---- An output a lane.

QUANTIZE_DEVICE int32_t direct_dot(const BinaryCall& c, int sample, int h, int w, int n) {
  const int inputs = c.inputs(), first = n / c.outputs() * inputs;
  const uint32_t* codes = c.codes + int64_t(n) * c.code_words();
  int32_t count = 0, ones = 0, length = 0;
  for (int i = 0; i < c.kernel[0]; ++i) {
    const int y = h * c.stride[0] - c.padding[0] + i * c.dilation[0];
    if (unsigned(y) >= unsigned(c.height)) continue;
    for (int j = 0; j < c.kernel[1]; ++j) {
      const int x = w * c.stride[1] - c.padding[1] + j * c.dilation[1];
      if (unsigned(x) >= unsigned(c.width)) continue;
      const uint32_t* pixel = c.image + ((int64_t(sample) * c.height + y) * c.width + x) * c.pixel_words();
      const int tap = (i * c.kernel[1] + j) * inputs;
      for (int k = 0; k < inputs; k += 32) {
        const uint32_t weights = bits_at(codes, tap + k, tap + inputs);
        count += popcount(bits_at(pixel, first + k, first + inputs) ^ weights);
        ones += popcount(weights);
      }
      length += inputs;
    }
  }
  return binary_dot(c.unit, count, c.unit ? -ones : length);
}

// A warp has 32 channels of a pixel, or 32 pixels of a channel where those lie together in memory. units: how many such. share: words of a
// pixel's outputs, or the 32s of pixels.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceBinary::threads)
    binary_direct(BinaryCall c, Divider share, Divider out_pixels, Divider out_width, int rows, int units) {
  const int lane = threadIdx.x % Warp::lanes, step = gridDim.x * DeviceBinary::warps;
  const bool lanes_are_channels = c.together || c.out_bits;
  for (int unit = blockIdx.x * DeviceBinary::warps + threadIdx.x / Warp::lanes; unit < units; unit += step) {
    const int outer = share.quotient(unit), inner = unit - outer * share.divisor;
    const int row = lanes_are_channels ? outer : inner * 32 + lane, n = lanes_are_channels ? inner * 32 + lane : outer;
    int32_t dot = 0;
    int sample = 0, at = 0;
    if (row < rows && n < c.out_channels) {
      sample = out_pixels.quotient(row), at = row - sample * out_pixels.divisor;
      const int h = out_width.quotient(at);
      dot = direct_dot(c, sample, h, at - h * out_width.divisor, n);
    }
    if (lanes_are_channels)
      store_word(c, row, inner, dot);
    else if (row < rows)
      store_value(c, (int64_t(sample) * c.out_channels + n) * out_pixels.divisor + at, n, dot);
  }
}

// ---- A few rows of a linear layer.

QUANTIZE_DEVICE int32_t distance(const uint4& a, const uint4& b) {
  return popcount(a.x ^ b.x) + popcount(a.y ^ b.y) + popcount(a.z ^ b.z) + popcount(a.w ^ b.w);
}
QUANTIZE_DEVICE int32_t distance(uint64_t a, uint64_t b) { return popcount(uint32_t(a ^ b)) + popcount(uint32_t((a ^ b) >> 32)); }

// A block has 32 output channels, 4 a warp. V: what a lane reads at once, uint4 or uint64_t. rows <= R.
template <int R, typename V>
__global__ void __launch_bounds__(DeviceBinary::threads) binary_rows(BinaryCall c) {
  constexpr int some = DeviceBinary::channels_of_warp;
  __shared__ int32_t dots[R][32];
  const int lane = threadIdx.x % Warp::lanes, warp = threadIdx.x / Warp::lanes, first = blockIdx.x * 32 + warp * some;
  const int vectors = c.code_words() * 4 / int(sizeof(V));
  const V *codes = reinterpret_cast<const V*>(c.codes), *image = reinterpret_cast<const V*>(c.image);
  int32_t counts[R][some] = {};
  for (int v = lane; v < vectors; v += Warp::lanes) {
    V weights[some];
#pragma unroll
    for (int j = 0; j < some; ++j) weights[j] = codes[int64_t(std::min(first + j, c.out_channels - 1)) * vectors + v];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const V x = image[int64_t(std::min(r, c.batch - 1)) * vectors + v];
#pragma unroll
      for (int j = 0; j < some; ++j) counts[r][j] += distance(x, weights[j]);
    }
  }
  share_sums(counts, dots);
  if (warp >= c.batch) return;
  const int n = std::min(int(blockIdx.x) * 32 + lane, c.out_channels - 1), length = c.length();
  const int32_t offset = c.unit ? -binary_ones(length, c.sums[n]) : length;
  store_word(c, warp, blockIdx.x, binary_dot(c.unit, dots[warp][lane], offset));
}

}  // namespace quantize::packed
