// Binary convolution and linear layers on tensor cores: an implicit GEMM of bits.
//
// mma.m16n8k256 counts a & w (the xor of older cores is emulated on newer ones). With p = popcount(a & w), of inputs a and weights w:
//
//   {0, 1}:  dot = popcount(a) - 2p
//   signs:   dot = 4p - 2 popcount(a) + the sum of the weights whose taps are inside the image
//
// where taps outside have a = 0. popcount(a) is one more column of the product, of weights that are all ones and cost no memory. Sums of
// weights over the taps inside, a rectangle of the kernel, are differences of sums over its corners (total_weights).
//
// K is taps of whole words of 64 bits on the device, so that a tap of a pixel is copied as it lies in the image: rows of codes, which are
// dense across taps, are spread (spread_codes) unless the channels are a multiple of 64.
#pragma once

#include "binary.cuh"
#include "mma_tiles.cuh"

namespace quantize::packed {

struct BinaryTiles {
  static constexpr int least_outputs = 8;    // of a group: with fewer, most of a tile would be filling
  static constexpr int most_taps = 1 << 14;  // of a line of the kernel
};

// ---- Weights.

// Words of K of a group on the device.
QUANTIZE_HOST_DEVICE int tap_words(const BinaryCall& c) { return BinaryCall::words_of(c.inputs()); }
inline bool is_spread(const BinaryCall& c) { return c.inputs() % 64 == 0 || c.taps() == 1; }
inline bool has_totals(const BinaryCall& c) { return !c.unit && !(c.taps() == 1 && !c.padded()); }
inline int64_t totals_size(const BinaryCall& c) {
  return int64_t(c.out_channels) * (c.padded() ? int64_t(c.kernel[0] + 1) * (c.kernel[1] + 1) : 1);
}

// codes to weights [out_channels, taps, tap words].
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceBinary::threads) spread_codes(BinaryCall c, uint32_t* weights) {
  const int inputs = c.inputs(), words = tap_words(c), row = c.taps() * words;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, all = int64_t(c.out_channels) * row;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t n = i / row;
    const int at = int(i - n * row), tap = at / words, bit = (at - tap * words) * 32;
    weights[i] = bit < inputs ? bits_at(c.codes + n * c.code_words(), tap * inputs + bit, (tap + 1) * inputs) : 0;
  }
}

// totals[h][w][n]: of the taps above and left of (h, w); where nothing is padded only the last of these.
[[maybe_unused]] static __global__ void __launch_bounds__(DeviceBinary::threads) total_weights(BinaryCall c, int32_t* totals) {
  const int rows = c.kernel[0], columns = c.kernel[1], all = c.out_channels;
  const bool corners = c.padded();
  for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < all; n += gridDim.x * blockDim.x) {
    if (!corners) {
      int32_t total = 0;
      for (int tap = 0; tap < rows * columns; ++tap) total += c.sums[int64_t(tap) * all + n];
      totals[n] = total;
      continue;
    }
    const auto corner = [&](int h, int w) -> int32_t& { return totals[(int64_t(h) * (columns + 1) + w) * all + n]; };
    for (int w = 0; w <= columns; ++w) corner(0, w) = 0;
    for (int h = 0; h < rows; ++h) {
      int32_t line = corner(h + 1, 0) = 0;
      for (int w = 0; w < columns; ++w) {
        line += c.sums[(int64_t(h) * columns + w) * all + n];
        corner(h + 1, w + 1) = corner(h, w + 1) + line;
      }
    }
  }
}

// ---- The product.

// Tiles of `n` columns that a group's outputs take; bits are written to the end of their last word of 64.
QUANTIZE_HOST_DEVICE int tiles_across(const BinaryCall& c, int n) {
  return ((c.out_bits ? BinaryCall::words_of(c.outputs()) * 32 : c.outputs()) + n - 1) / n;
}

// An output pixel: where its window begins in the image, and which taps are inside: [begin, end) of the kernel's lines and columns.
struct TileRow {
  int sample, h, w;
  int16_t begin[2], end[2];
};

QUANTIZE_DEVICE void taps_inside(int at, int dilation, int size, int kernel, int16_t& begin, int16_t& end) {
  const int first = at < 0 ? (-at + dilation - 1) / dilation : 0, last = at < size ? (size - at + dilation - 1) / dilation : 0;
  end = int16_t(std::min(last, kernel));
  begin = int16_t(std::min(first, int(end)));
}

QUANTIZE_DEVICE TileRow tile_row(const BinaryCall& c, Divider out_pixels, Divider out_width, int64_t row) {
  TileRow r{0, -(1 << 30), 0, {0, 0}, {0, 0}};  // behind the last: nothing is inside
  if (row >= c.out_rows()) return r;
  r.sample = out_pixels.quotient(uint32_t(row));
  const int at = int(row - int64_t(r.sample) * out_pixels.divisor), h = out_width.quotient(at);
  r.h = h * c.stride[0] - c.padding[0], r.w = (at - h * int(out_width.divisor)) * c.stride[1] - c.padding[1];
  taps_inside(r.h, c.dilation[0], c.height, c.kernel[0], r.begin[0], r.end[0]);
  taps_inside(r.w, c.dilation[1], c.width, c.kernel[1], r.begin[1], r.end[1]);
  return r;
}

// The sum of channel n's weights whose taps are inside.
QUANTIZE_DEVICE int32_t weights_inside(const BinaryCall& c, const int32_t* totals, const TileRow& r, int n) {
  if (!c.padded()) return totals[n];
  const auto corner = [&](int h, int w) { return totals[(int64_t(h) * (c.kernel[1] + 1) + w) * c.out_channels + n]; };
  int32_t sum = corner(r.end[0], r.end[1]);
  if (r.begin[0]) sum -= corner(r.begin[0], r.end[1]);
  if (r.begin[1]) sum -= corner(r.end[0], r.begin[1]);
  if (r.begin[0] && r.begin[1]) sum += corner(r.begin[0], r.begin[1]);
  return sum;
}

// A block a tile, channels first. weights: [out_channels, taps, tap words]. V: words of a copy, 2 or 4.
template <typename Tile, int V>
__global__ void __launch_bounds__(MmaTraits::threads)
    binary_tiles(BinaryCall c, TileDividers by, const uint32_t* __restrict__ weights, const int32_t* __restrict__ totals) {
  alignas(16) __shared__ uint32_t memory[Tile::memory];
  __shared__ TileRow rows[Tile::m];
  const int outputs = c.outputs(), across = tiles_across(c, Tile::n);
  const int column = blockIdx.x % (across * c.groups), group = column / across, first_n = column % across * Tile::n;
  const int64_t first_m = int64_t(blockIdx.x / (across * c.groups)) * Tile::m;
  for (int r = threadIdx.x; r < Tile::m; r += MmaTraits::threads) rows[r] = tile_row(c, by.out_pixels, by.out_width, first_m + r);
  __syncthreads();

  const int words = tap_words(c), row_words = c.taps() * words, pixel_words = c.pixel_words();
  struct Place {
    int k, h, w;
    const uint32_t* image;
  };
  const auto place = [&](int k) {
    const int tap = by.tap_words.quotient(k), line = by.kernel_width.quotient(tap);
    return Place{k, line * c.dilation[0], (tap - line * c.kernel[1]) * c.dilation[1], c.image + group * words + (k - tap * words)};
  };
  const auto inputs = [&](int row, const Place& at) -> const uint32_t* {
    const TileRow& r = rows[row];
    const bool inside = unsigned(r.h + at.h) < unsigned(c.height) && unsigned(r.w + at.w) < unsigned(c.width);
    const int64_t pixel = (int64_t(r.sample) * c.height + (r.h + at.h)) * c.width + (r.w + at.w);
    return inside ? at.image + pixel * pixel_words : nullptr;
  };
  const auto own_weights = [&](int n, const Place& at) -> const uint32_t* {
    return first_n + n < outputs ? weights + (int64_t(group) * outputs + first_n + n) * row_words + at.k : nullptr;
  };
  int32_t counts[Tile::warp_m][Tile::warp_n + 1][4] = {};  // the last column of fragments counts the ones of a
  multiply_tile<Tile, V>(memory, row_words, weights, place, inputs, own_weights, [&](int i, const uint32_t(&a)[4], const auto& b) {
#pragma unroll
    for (int j = 0; j < Tile::warp_n; ++j) multiply_bits(counts[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    multiply_bits(counts[i][Tile::warp_n], a, ~0u, ~0u);
  });

  // Through shared memory, so that outputs are written as they lie.
  int32_t* dots = reinterpret_cast<int32_t*>(memory);
  Fragments<Tile>().each([&](int row, int n, int i, int j, int e) {
    const int32_t both = counts[i][j][e], ones = counts[i][Tile::warp_n][e];
    dots[row * Tile::dots_pitch + n] = c.unit ? ones - 2 * both : 4 * both - 2 * ones;
  });
  __syncthreads();
  const int64_t all = c.out_rows();
  const auto dot = [&](int row, int n) {
    const int32_t partial = dots[row * Tile::dots_pitch + n];
    return c.unit ? partial : partial + weights_inside(c, totals, rows[row], group * outputs + first_n + n);
  };
  if (c.out_bits) {
    constexpr int tile_words = Tile::n / 32;
    for (int i = threadIdx.x; i < Tile::m * tile_words; i += MmaTraits::threads) {
      const int row = i % Tile::m, word = i / Tile::m, from = word * 32, target = (group * outputs + first_n) / 32 + word;
      if (first_m + row >= all || target >= c.out_words()) continue;
      uint32_t bits = 0;
      for (int n = from; n < std::min(from + 32, outputs - first_n); ++n)
        bits |= uint32_t(next_bit(c, group * outputs + first_n + n, dot(row, n))) << (n - from);
      c.out_bits[(first_m + row) * c.out_words() + target] = bits;
    }
    return;
  }
  for (int i = threadIdx.x; i < Tile::m * Tile::n; i += MmaTraits::threads) {
    const int row = c.together ? i / Tile::n : i % Tile::m, n = c.together ? i % Tile::n : i / Tile::m;
    if (first_m + row >= all || first_n + n >= outputs) continue;
    const int channel = group * outputs + first_n + n;
    const int64_t at = first_m + row, sample = rows[row].sample, pixels = c.out_pixels();
    store_value(c, c.together ? at * c.out_channels + channel : (sample * c.out_channels + channel) * pixels + (at - sample * pixels),
                channel, dot(row, n));
  }
}

}  // namespace quantize::packed
