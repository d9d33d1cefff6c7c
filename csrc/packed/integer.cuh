// Layers of 2 to 8 bits on inputs of as many, on the device: exact 32-bit sums of 8-bit products, as on the CPU (gemm_kernels.h).
//
// The input becomes an image of bytes, padded with the code of zero, a pixel's channels together and each group's filled up to a word of
// four. Then
//
//   tiles    implicit GEMM on tensor cores (integer_tiles.cuh), of weights decoded to bytes first
//   rows     a few rows of a linear layer: codes are decoded in registers, so that memory gives no more than the codes
#pragma once

#include "../core/divider.h"
#include "../core/grid.h"
#include "../core/warp.cuh"
#include "../weight/lsq.h"
#include "mma_tiles.cuh"
#include "row_codes.h"
#include "word_decoder.cuh"

namespace quantize::packed {

struct DeviceInteger {
  static constexpr int threads = 256, warps = threads / Warp::lanes, blocks = 8;  // blocks: of a multiprocessor
  static constexpr int words_at_once = 4;                                         // of a pixel, read from planes
  static constexpr int most_rows = 8;                                             // that go through the codes together
  static constexpr int most_grid_rows = 65535;                                    // CUDA's gridDim.y
  static constexpr int channels_of_warp = 4;                                      // whose codes are in flight together
};

// A layer and its memory. A linear layer is a convolution of images of one pixel. is_countable() says how large things may be.
struct IntegerCall {
  int batch, channels, height = 1, width = 1, out_channels, out_height = 1, out_width = 1, groups = 1;
  int kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};  // of height and width
  bool together = false;  // the channels of a pixel of floats: [N, H, W, C], not [N, C, H, W]
  const float* floats;    // the input
  const float *step, *zero_point;
  int most_code;         // of the input's grid: 2^bits - 1
  const uint8_t* codes;  // [out_channels, code_bytes()]
  int bits;              // of a code: 2, 4 or 8
  const float* levels;   // [2^bits]; at 8 bits codes are two's complement
  const int32_t* sums;   // [out_channels], of the levels
  const float* scales;
  const float* bias = nullptr;      // null: 0
  const float* residual = nullptr;  // added, laid out as the output; null: nothing
  float low, high;                  // then clipped to these
  float* out;

  QUANTIZE_HOST_DEVICE int inputs() const { return channels / groups; }
  QUANTIZE_HOST_DEVICE int outputs() const { return out_channels / groups; }
  QUANTIZE_HOST_DEVICE int tap_words() const { return (inputs() + 3) / 4; }
  QUANTIZE_HOST_DEVICE int pixel_words() const { return groups * tap_words(); }
  QUANTIZE_HOST_DEVICE int taps() const { return kernel[0] * kernel[1]; }
  QUANTIZE_HOST_DEVICE int row_words() const { return taps() * tap_words(); }
  QUANTIZE_HOST_DEVICE int padded_height() const { return height + 2 * padding[0]; }
  QUANTIZE_HOST_DEVICE int padded_width() const { return width + 2 * padding[1]; }
  QUANTIZE_HOST_DEVICE int out_pixels() const { return out_height * out_width; }
  QUANTIZE_HOST_DEVICE int64_t out_rows() const { return int64_t(batch) * out_height * out_width; }  // as a matrix
  int64_t code_bytes() const { return (int64_t(taps()) * inputs() * bits + 63) / 64 * 8; }
  int64_t pixels() const { return int64_t(batch) * padded_height() * padded_width(); }  // of the image
};

// ---- Inputs.

// What a kernel asks of the input's grid once.
struct InputGrid {
  weight::LsqRange range;
  int zero_point;

  QUANTIZE_DEVICE explicit InputGrid(const IntegerCall& c)
      : range(weight::lsq_range(*c.step, *c.zero_point, c.most_code)), zero_point(int(*c.zero_point)) {}

  // The code of x (activation.h): the ends are whole numbers, so that the order of clipping and rounding is the other way round. NaN has
  // the lowest.
  QUANTIZE_DEVICE uint32_t code(float x) const {
    const float v = x * range.inverse, above = v > range.low ? v : range.low, within = above < range.high ? above : range.high;
    return (float_bits(within + 12582912.f) + uint32_t(zero_point)) & 255;
  }
};

// A word of four channels of a pixel: value(channel) of those there are, zeros behind.
template <typename Value>
QUANTIZE_DEVICE uint32_t word_of_codes(const IntegerCall& c, Divider tap_words, int at, const Value& value) {
  const int group = tap_words.quotient(at), inputs = c.inputs(), first = (at - group * int(tap_words.divisor)) * 4;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first + i < inputs) word |= value(group * inputs + first + i) << (8 * i);
  return word;
}

struct ImageDividers {
  Divider plane, width, pixel_words, tap_words;  // plane, width: of the padded image
};

// The pixel of the input that one of the padded image is, or -1.
QUANTIZE_DEVICE int64_t pixel_of(const IntegerCall& c, const ImageDividers& by, int padded, int& sample) {
  sample = by.plane.quotient(padded);
  const int at = padded - sample * int(by.plane.divisor), line = by.width.quotient(at);
  const int h = line - c.padding[0], w = at - line * int(by.width.divisor) - c.padding[1];
  return unsigned(h) < unsigned(c.height) && unsigned(w) < unsigned(c.width) ? int64_t(h) * c.width + w : -1;
}

// Planes: a lane a pixel, blockIdx.y some words, or several times so many where a grid has not as many rows.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceInteger::threads)
    pack_integer_planes(IntegerCall c, ImageDividers by, int pixels, uint32_t* image) {
  constexpr int some = DeviceInteger::words_at_once;
  const InputGrid grid(c);
  const int words = c.pixel_words(), step = gridDim.x * blockDim.x;
  const int64_t plane = int64_t(c.height) * c.width;
  for (int first = blockIdx.y * some; first < words; first += gridDim.y * some)
    for (int pixel = blockIdx.x * blockDim.x + threadIdx.x; pixel < pixels; pixel += step) {
      int sample;
      const int64_t at = pixel_of(c, by, pixel, sample);
      const float* x = c.floats + int64_t(sample) * c.channels * plane + at;
      uint32_t found[some];
#pragma unroll
      for (int i = 0; i < some; ++i)
        found[i] = word_of_codes(c, by.tap_words, std::min(first + i, words - 1),
                                 [&](int channel) { return at < 0 ? uint32_t(grid.zero_point) : grid.code(x[channel * plane]); });
      uint32_t* target = image + int64_t(pixel) * words + first;
      if (words % some == 0) {
        *reinterpret_cast<uint4*>(target) = {found[0], found[1], found[2], found[3]};
      } else {
#pragma unroll
        for (int i = 0; i < some; ++i)
          if (first + i < words) target[i] = found[i];
      }
    }
}

// Channels together: a lane a word. words: of the image. four: floats are read in fours.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceInteger::threads)
    pack_integer_rows(IntegerCall c, ImageDividers by, int words, bool four, uint32_t* image) {
  const InputGrid grid(c);
  const int step = gridDim.x * blockDim.x;
  for (int word = blockIdx.x * blockDim.x + threadIdx.x; word < words; word += step) {
    const int padded = by.pixel_words.quotient(word), at = word - padded * int(by.pixel_words.divisor);
    int sample;
    const int64_t pixel = pixel_of(c, by, padded, sample);
    const float* x = c.floats + (int64_t(sample) * c.height * c.width + pixel) * c.channels;
    uint32_t found = 0;
    if (four && pixel >= 0) {
      const uint4 values = *reinterpret_cast<const uint4*>(x + at * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= grid.code(bits_float(vector_word(values, i))) << (8 * i);
    } else {
      found =
          word_of_codes(c, by.tap_words, at, [&](int channel) { return pixel < 0 ? uint32_t(grid.zero_point) : grid.code(x[channel]); });
    }
    image[word] = found;
  }
}

// ---- Weights.

// Codes to bytes [out_channels, taps, tap words], zeros behind a group's inputs.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceInteger::threads)
    decode_bytes(IntegerCall c, Divider row_words, Divider tap_words, int64_t code_bytes, int words, uint32_t* weights) {
  const int step = gridDim.x * blockDim.x, inputs = c.inputs();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step) {
    const int n = row_words.quotient(i), at = i - n * int(row_words.divisor), tap = tap_words.quotient(at);
    const int first = (at - tap * int(tap_words.divisor)) * 4;
    const uint8_t* row = c.codes + n * code_bytes;
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (first + k < inputs) word |= level_byte(c.levels, c.bits, code_at(row, int64_t(tap) * inputs + first + k, c.bits)) << (8 * k);
    weights[i] = word;
  }
}

// ---- Outputs.

// What sums become (image_kernels.h, finish and finish_clipped): two roundings, no fma; the end of a range is where a comparison says so,
// and NaN stays.
struct IntegerOutput {
  float step;
  int zero_point;

  QUANTIZE_DEVICE explicit IntegerOutput(const InputGrid& grid) : step(grid.range.step), zero_point(grid.zero_point) {}

  QUANTIZE_DEVICE void operator()(const IntegerCall& c, int64_t at, int n, int32_t sum) const {
    const float gain = step * c.scales[n], product = float(sum - zero_point * c.sums[n]) * gain;
    float value = product + (c.bias ? c.bias[n] : 0.f);
    if (c.residual) value += c.residual[at];
    value = value < c.low ? c.low : value;
    c.out[at] = value > c.high ? c.high : value;
  }
};

// ---- A few rows of a linear layer.

// A block has 32 output channels, 4 a warp. image: [batch, pitch], zeros behind the inputs for as long as codes go. V: what a lane reads of
// the codes at once, uint4 or uint64_t; vectors: of a row. batch <= R.
template <int R, int bits, typename V>
__global__ void __launch_bounds__(DeviceInteger::threads)
    integer_rows(IntegerCall c, const uint32_t* __restrict__ image, int vectors, int pitch) {
  using Decoder = WordDecoder<bits>;
  constexpr int some = DeviceInteger::channels_of_warp;
  constexpr int all = int(sizeof(V)) / 4 * Decoder::words, chunk = std::min(all, 4);  // words of inputs to a V, and loaded at once
  struct alignas(chunk * 4) Words {
    uint32_t words[chunk];
  };
  __shared__ int32_t dots[R][32];
  const int lane = threadIdx.x % Warp::lanes, warp = threadIdx.x / Warp::lanes, first = blockIdx.x * 32 + warp * some;
  const V* codes = reinterpret_cast<const V*>(c.codes);
  const Decoder decoder(c.levels);
  int32_t sums[R][some] = {};
  for (int v = lane; v < vectors; v += Warp::lanes) {
    V own[some];
#pragma unroll
    for (int j = 0; j < some; ++j) own[j] = codes[int64_t(std::min(first + j, c.out_channels - 1)) * vectors + v];
    static_for<all / chunk>([&]<int part>() {
      uint32_t weights[chunk][some];
      static_for<chunk>([&]<int i>() {
        constexpr int word = part * chunk + i;
#pragma unroll
        for (int j = 0; j < some; ++j) weights[i][j] = decoder.template four<word % Decoder::words>(word_at(own[j], word / Decoder::words));
      });
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Words x =
            *reinterpret_cast<const Words*>(image + int64_t(std::min(r, c.batch - 1)) * pitch + int64_t(v) * all + part * chunk);
#pragma unroll
        for (int i = 0; i < chunk; ++i)
#pragma unroll
          for (int j = 0; j < some; ++j) sums[r][j] = dot_bytes(x.words[i], weights[i][j], sums[r][j]);
      }
    });
  }
  share_sums(sums, dots);
  const int n = blockIdx.x * 32 + lane;
  if (warp >= c.batch || n >= c.out_channels) return;
  IntegerOutput(InputGrid(c))(c, int64_t(warp) * c.out_channels + n, n, dots[warp][lane]);
}

}  // namespace quantize::packed
