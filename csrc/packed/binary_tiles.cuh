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

namespace quantize::packed {

struct TileTraits {
  static constexpr int threads = 128, warps_down = 2, warps_across = 2;
  static constexpr int step_words = 16, mma_words = 8;  // of K: of a step of the pipeline, of an instruction
  static constexpr int pitch = 20;                      // words of a row in shared memory: 8 rows of 16 bytes meet all banks once
  static constexpr int stages = 3;
  static constexpr int least_outputs = 8;    // of a group: with fewer, most of a tile would be filling
  static constexpr int most_taps = 1 << 14;  // of a line of the kernel
};

// Rows of output pixels by columns of output channels; a warp's share in fragments of 16 and of 8.
template <int warp_m, int warp_n>
struct Tile {
  static constexpr int m = TileTraits::warps_down * warp_m * 16, n = TileTraits::warps_across * warp_n * 8;
  static constexpr int stage = (m + n) * TileTraits::pitch, dots_pitch = n + 1;
  static constexpr int memory = std::max(TileTraits::stages * stage, m* dots_pitch);
};
using WideTile = Tile<4, 4>;
using SmallTile = Tile<1, 2>;

// ---- Instructions; on the CPU, lanes exchange what the hardware would.

// `words` of them from global to shared memory, or zeros.
template <int words>
QUANTIZE_DEVICE void copy_words(uint32_t* target, const uint32_t* source, bool inside) {
#ifdef __CUDA_ARCH__
  const uint32_t address = uint32_t(__cvta_generic_to_shared(target));
  const int bytes = inside ? words * 4 : 0;
  if constexpr (words == 4)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
#else
  for (int i = 0; i < words; ++i) target[i] = inside ? source[i] : 0;
#endif
}
QUANTIZE_DEVICE void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all but the last `left` groups have arrived.
template <int left>
QUANTIZE_DEVICE void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

// Four matrices of 8 rows by 4 words. Lanes 8j to 8j + 7 name the rows of matrix j; lane 4r + i gets word i of row r of each.
QUANTIZE_DEVICE void load_matrices(uint32_t (&words)[4], const uint32_t* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  __shared__ const uint32_t* rows[TileTraits::threads];
  const int lane = threadIdx.x % Warp::lanes;
  rows[threadIdx.x] = row;
  __syncwarp();
  for (int j = 0; j < 4; ++j) words[j] = rows[threadIdx.x - lane + 8 * j + lane / 4][lane % 4];
  __syncwarp();
#endif
}

// c += popcount(a & b), 16 x 8 of 256 bits. Words of a: rows lane / 4 and 8 below, then the same of K's second half, word lane % 4 of each
// half; of b: column lane / 4 likewise. c: rows lane / 4 and 8 below, columns lane % 4 * 2 and the next.
QUANTIZE_DEVICE void multiply_bits(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __shared__ uint32_t all[TileTraits::threads][6];
  const int lane = threadIdx.x % Warp::lanes;
  auto* warp = all + threadIdx.x - lane;
  std::copy_n(a, 4, warp[lane]);
  warp[lane][4] = b0, warp[lane][5] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k)
      c[i] += std::popcount(warp[lane / 4 * 4 + k % 4][k / 4 * 2 + i / 2] & warp[(lane % 4 * 2 + i % 2) * 4 + k % 4][4 + k / 4]);
  __syncwarp();
#endif
}

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

struct TileDividers {
  Divider out_pixels, out_width, tap_words, kernel_width;
};

// A block a tile, channels first. weights: [out_channels, taps, tap words]. V: words of a copy, 2 or 4.
template <int warp_m, int warp_n, int V>
__global__ void __launch_bounds__(TileTraits::threads)
    binary_tiles(BinaryCall c, TileDividers by, const uint32_t* __restrict__ weights, const int32_t* __restrict__ totals) {
  using T = TileTraits;
  using Shape = Tile<warp_m, warp_n>;
  alignas(16) __shared__ uint32_t memory[Shape::memory];
  __shared__ TileRow rows[Shape::m];
  const int lane = threadIdx.x % Warp::lanes, warp = threadIdx.x / Warp::lanes;
  const int outputs = c.outputs(), across = tiles_across(c, Shape::n);
  const int column = blockIdx.x % (across * c.groups), group = column / across, first_n = column % across * Shape::n;
  const int64_t first_m = int64_t(blockIdx.x / (across * c.groups)) * Shape::m;
  for (int r = threadIdx.x; r < Shape::m; r += T::threads) rows[r] = tile_row(c, by.out_pixels, by.out_width, first_m + r);
  __syncthreads();

  const int words = tap_words(c), row_words = c.taps() * words, pixel_words = c.pixel_words();
  constexpr int copies = T::step_words / V, apart = T::threads / copies;  // of a row; rows copied at once
  static_assert(Shape::m % apart == 0 && Shape::n % apart == 0);
  const int own_row = threadIdx.x / copies, own_word = threadIdx.x % copies * V;
  const auto load = [&](int step) {
    uint32_t* target = memory + step % T::stages * Shape::stage + own_row * T::pitch + own_word;
    const int k = step * T::step_words + own_word, tap = by.tap_words.quotient(k), line = by.kernel_width.quotient(tap);
    const int h = line * c.dilation[0], w = (tap - line * c.kernel[1]) * c.dilation[1];
    const bool some = k < row_words;
    const uint32_t* image = c.image + group * words + (k - tap * words);
#pragma unroll
    for (int i = 0; i < Shape::m / apart; ++i) {
      const TileRow& r = rows[own_row + i * apart];
      const bool inside = some && unsigned(r.h + h) < unsigned(c.height) && unsigned(r.w + w) < unsigned(c.width);
      const int64_t pixel = (int64_t(r.sample) * c.height + (r.h + h)) * c.width + (r.w + w);
      copy_words<V>(target + i * apart * T::pitch, inside ? image + pixel * pixel_words : c.image, inside);
    }
#pragma unroll
    for (int i = 0; i < Shape::n / apart; ++i) {
      const int n = first_n + own_row + i * apart;
      const bool inside = some && n < outputs;
      copy_words<V>(target + (Shape::m + i * apart) * T::pitch, inside ? weights + (int64_t(group) * outputs + n) * row_words + k : weights,
                    inside);
    }
  };

  // The last column of fragments counts the ones of a.
  int32_t counts[warp_m][warp_n + 1][4] = {};
  const int warp_row = warp / T::warps_across * warp_m * 16, warp_column = warp % T::warps_across * warp_n * 8;
  const int steps = (row_words + T::step_words - 1) / T::step_words;
#pragma unroll
  for (int step = 0; step < T::stages - 1; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<T::stages - 2>();
    __syncthreads();  // and all are through with the stage that is loaded next
    if (step + T::stages - 1 < steps) load(step + T::stages - 1);
    commit_copies();
    const uint32_t* stage = memory + step % T::stages * Shape::stage;
    const uint32_t* a_row = stage + (warp_row + lane % 16) * T::pitch + lane / 16 * 4;
    const uint32_t* b_row = stage + (Shape::m + warp_column + lane / 16 * 8 + lane % 8) * T::pitch + lane / 8 % 2 * 4;
#pragma unroll
    for (int k = 0; k < T::step_words; k += T::mma_words) {
      if (step * T::step_words + k >= row_words) break;
      uint32_t b[warp_n / 2][4];
#pragma unroll
      for (int j = 0; j < warp_n / 2; ++j) load_matrices(b[j], b_row + j * 16 * T::pitch + k);
#pragma unroll
      for (int i = 0; i < warp_m; ++i) {
        uint32_t a[4];
        load_matrices(a, a_row + i * 16 * T::pitch + k);
#pragma unroll
        for (int j = 0; j < warp_n; ++j) multiply_bits(counts[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        multiply_bits(counts[i][warp_n], a, ~0u, ~0u);
      }
    }
  }
  wait_copies<0>();
  __syncthreads();

  // Through shared memory, so that outputs are written as they lie.
  int32_t* dots = reinterpret_cast<int32_t*>(memory);
#pragma unroll
  for (int i = 0; i < warp_m; ++i)
#pragma unroll
    for (int j = 0; j < warp_n; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + i * 16 + e / 2 * 8 + lane / 4, at = warp_column + j * 8 + lane % 4 * 2 + e % 2;
        const int32_t both = counts[i][j][e], ones = counts[i][warp_n][e];
        dots[row * Shape::dots_pitch + at] = c.unit ? ones - 2 * both : 4 * both - 2 * ones;
      }
  __syncthreads();
  const int64_t all = c.out_rows();
  const auto dot = [&](int row, int n) {
    const int32_t partial = dots[row * Shape::dots_pitch + n];
    return c.unit ? partial : partial + weights_inside(c, totals, rows[row], group * outputs + first_n + n);
  };
  if (c.out_bits) {
    constexpr int tile_words = Shape::n / 32;
    for (int i = threadIdx.x; i < Shape::m * tile_words; i += T::threads) {
      const int row = i % Shape::m, word = i / Shape::m, from = word * 32, target = (group * outputs + first_n) / 32 + word;
      if (first_m + row >= all || target >= c.out_words()) continue;
      uint32_t bits = 0;
      for (int n = from; n < std::min(from + 32, outputs - first_n); ++n)
        bits |= uint32_t(next_bit(c, group * outputs + first_n + n, dot(row, n))) << (n - from);
      c.out_bits[(first_m + row) * c.out_words() + target] = bits;
    }
    return;
  }
  for (int i = threadIdx.x; i < Shape::m * Shape::n; i += T::threads) {
    const int row = c.together ? i / Shape::n : i % Shape::m, n = c.together ? i % Shape::n : i / Shape::m;
    if (first_m + row >= all || first_n + n >= outputs) continue;
    const int channel = group * outputs + first_n + n;
    const int64_t at = first_m + row, sample = rows[row].sample, pixels = c.out_pixels();
    store_value(c, c.together ? at * c.out_channels + channel : (sample * c.out_channels + channel) * pixels + (at - sample * pixels),
                channel, dot(row, n));
  }
}

}  // namespace quantize::packed
