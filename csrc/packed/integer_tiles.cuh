// Integer convolution and linear layers on tensor cores: an implicit GEMM of bytes, mma.m16n8k32 of unsigned inputs and signed weights.
// K is taps of whole words of the padded image, so that a tap is a fixed distance from its pixel.
#pragma once

#include "integer.cuh"

namespace quantize::packed {

// A block a tile, channels first. image: of pack_integer_planes or _rows. weights: of decode_bytes. V: words of a copy.
template <typename Tile, int V>
__global__ void __launch_bounds__(MmaTraits::threads)
    integer_tiles(IntegerCall c, TileDividers by, const uint32_t* __restrict__ image, const uint32_t* __restrict__ weights) {
  alignas(16) __shared__ uint32_t memory[Tile::memory];
  __shared__ int32_t starts[Tile::m];  // of windows, in words of the image
  const int outputs = c.outputs(), across = (outputs + Tile::n - 1) / Tile::n;
  const int column = blockIdx.x % (across * c.groups), group = column / across, first_n = column % across * Tile::n;
  const int64_t first_m = int64_t(blockIdx.x / (across * c.groups)) * Tile::m, rows = c.out_rows();
  const int width = c.padded_width(), words = c.tap_words(), row_words = c.row_words(), pixel_words = c.pixel_words();
  for (int r = threadIdx.x; r < Tile::m; r += MmaTraits::threads) {
    const int row = int(std::min(first_m + r, rows - 1)), sample = by.out_pixels.quotient(row);
    const int at = row - sample * int(by.out_pixels.divisor), h = by.out_width.quotient(at), w = at - h * int(by.out_width.divisor);
    starts[r] = ((sample * c.padded_height() + h * c.stride[0]) * width + w * c.stride[1]) * pixel_words;
  }
  __syncthreads();

  struct Place {
    int k;
    const uint32_t* image;
  };
  const auto place = [&](int k) {
    const int tap = by.tap_words.quotient(k), line = by.kernel_width.quotient(tap), along = tap - line * c.kernel[1];
    const int64_t pixel = int64_t(line * c.dilation[0]) * width + along * c.dilation[1];
    return Place{k, image + pixel * pixel_words + group * words + (k - tap * words)};
  };
  const auto inputs = [&](int row, const Place& at) { return at.image + starts[row]; };
  const auto own_weights = [&](int n, const Place& at) -> const uint32_t* {
    return first_n + n < outputs ? weights + (int64_t(group) * outputs + first_n + n) * row_words + at.k : nullptr;
  };
  int32_t sums[Tile::warp_m][Tile::warp_n][4] = {};
  multiply_tile<Tile, V>(memory, row_words, weights, place, inputs, own_weights, [&](int i, const uint32_t(&a)[4], const auto& b) {
#pragma unroll
    for (int j = 0; j < Tile::warp_n; ++j) multiply_bytes(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  });

  // Through shared memory, so that outputs are written as they lie.
  int32_t* dots = reinterpret_cast<int32_t*>(memory);
  Fragments<Tile>().each([&](int row, int n, int i, int j, int e) { dots[row * Tile::dots_pitch + n] = sums[i][j][e]; });
  __syncthreads();
  const IntegerOutput output{InputGrid(c)};
  const int64_t pixels = c.out_pixels();
  for (int i = threadIdx.x; i < Tile::m * Tile::n; i += MmaTraits::threads) {
    const int row = c.together ? i / Tile::n : i % Tile::m, n = c.together ? i % Tile::n : i / Tile::m;
    if (first_m + row >= rows || first_n + n >= outputs) continue;
    const int channel = group * outputs + first_n + n;
    const int64_t at = first_m + row, sample = by.out_pixels.quotient(uint32_t(at));
    output(c, c.together ? at * c.out_channels + channel : (sample * c.out_channels + channel) * pixels + (at - sample * pixels), channel,
           dots[row * Tile::dots_pitch + n]);
  }
}

}  // namespace quantize::packed
