// Which kernels a binary layer takes on the device, and their launches.
#pragma once

#include "binary_tiles.cuh"

namespace quantize::packed {

enum class BinaryPath { rows, small_tiles, wide_tiles, direct };

inline bool takes(const BinaryCall& c, BinaryPath path) {
  switch (path) {
    case BinaryPath::rows:
      return c.taps() == 1 && !c.padded() && c.height * c.width == 1 && c.groups == 1 && c.batch <= DeviceBinary::most_rows;
    case BinaryPath::small_tiles:
    case BinaryPath::wide_tiles:  // whole words of inputs, and of outputs where these are bits
      return (c.groups == 1 || (c.inputs() % 64 == 0 && (c.out || c.outputs() % 64 == 0))) && c.outputs() >= BinaryTiles::least_outputs &&
             c.kernel[0] < BinaryTiles::most_taps && c.kernel[1] < BinaryTiles::most_taps;
    case BinaryPath::direct:
      return true;
  }
  return false;
}

template <typename T>
int64_t tiles(const BinaryCall& c) {
  return (c.out_rows() + T::m - 1) / T::m * c.groups * tiles_across(c, T::n);
}

inline BinaryPath binary_path(const BinaryCall& c, int processors) {
  if (takes(c, BinaryPath::rows)) return BinaryPath::rows;
  if (!takes(c, BinaryPath::wide_tiles)) return BinaryPath::direct;
  return c.outputs() > SmallTile::n && tiles<WideTile>(c) >= processors ? BinaryPath::wide_tiles : BinaryPath::small_tiles;
}

// What `direct` shares out between warps (binary.cuh), and how many of these are of a pixel or a channel.
inline int64_t direct_share(const BinaryCall& c) {
  if (c.out_bits) return c.out_words();
  return c.together ? (c.out_channels + 31) / 32 : (c.out_rows() + 31) / 32;
}
inline int64_t direct_units(const BinaryCall& c) { return direct_share(c) * (c.together || c.out_bits ? c.out_rows() : c.out_channels); }

// Whether kernels can count a layer's pixels, words and outputs in 32 bits, and some blocks' steps beyond them.
inline bool is_countable(const BinaryCall& c) {
  constexpr int64_t most = int64_t(1) << 30;
  return c.pixels() * c.pixel_words() < most && c.out_rows() < most && (c.out_rows() + 31) / 32 * c.out_channels < most &&
         direct_units(c) < most;
}

// The image of `c.floats`.
template <typename Launcher>
const uint32_t* pack_binary(const BinaryCall& c, Launcher& launch) {
  const int words = c.pixel_words(), pixels = int(c.pixels()), threads = DeviceBinary::threads;
  uint32_t* image = launch.template scratch<uint32_t>(int64_t(pixels) * words);
  const auto grid = [&](int64_t items, int64_t per_block) {
    return unsigned(grid_size(launch.processors(), DeviceBinary::blocks, items, per_block));
  };
  if (c.together || c.height * c.width == 1)
    launch(pack_binary_rows, dim3(grid(int64_t(pixels) * words, DeviceBinary::warps * DeviceBinary::words_at_once)), threads, c,
           Divider(words), pixels * words, image);
  else
    launch(pack_binary_planes, dim3(grid(pixels, threads), unsigned(std::min(words, DeviceBinary::most_grid_rows))), threads, c,
           Divider(std::max(1, c.height * c.width)), pixels, image);
  return image;
}

template <typename Tile, typename Launcher>
void launch_tiles(const BinaryCall& c, Launcher& launch) {
  const int64_t weight_words = int64_t(c.out_channels) * c.taps() * tap_words(c), totals_words = totals_size(c);
  const auto grid = [&](int64_t items) {
    return dim3(unsigned(grid_size(launch.processors(), DeviceBinary::blocks, items, DeviceBinary::threads)));
  };
  const uint32_t* weights = c.codes;
  if (!is_spread(c)) {
    uint32_t* target = launch.template scratch<uint32_t>(weight_words);
    launch(spread_codes, grid(weight_words), DeviceBinary::threads, c, target);
    weights = target;
  }
  const int32_t* totals = c.sums;
  if (has_totals(c)) {
    int32_t* target = launch.template scratch<int32_t>(totals_words);
    launch(total_weights, grid(c.out_channels), DeviceBinary::threads, c, target);
    totals = target;
  }
  const TileDividers by{Divider(c.out_pixels()), Divider(c.out_width), Divider(tap_words(c)), Divider(c.kernel[1])};
  const bool wide = tap_words(c) % 4 == 0 && c.pixel_words() % 4 == 0 && is_aligned(c.image, 16) && is_aligned(weights, 16);
  launch(wide ? binary_tiles<Tile, 4> : binary_tiles<Tile, 2>, dim3(unsigned(tiles<Tile>(c))), MmaTraits::threads, c, by, weights, totals);
}

template <typename Launcher>
void launch_direct(const BinaryCall& c, Launcher& launch) {
  const int rows = int(c.out_rows()), share = int(direct_share(c)), units = int(direct_units(c));
  launch(binary_direct, dim3(unsigned(grid_size(launch.processors(), DeviceBinary::blocks, units, DeviceBinary::warps))),
         DeviceBinary::threads, c, Divider(share), Divider(c.out_pixels()), Divider(c.out_width), rows, units);
}

template <typename V, typename Launcher>
void launch_rows(const BinaryCall& c, Launcher& launch) {
  const auto kernel = c.batch == 1   ? binary_rows<1, V>
                      : c.batch == 2 ? binary_rows<2, V>
                      : c.batch <= 4 ? binary_rows<4, V>
                                     : binary_rows<8, V>;
  launch(kernel, dim3(unsigned(c.out_bits ? c.out_words() : (c.out_channels + 31) / 32)), DeviceBinary::threads, c);
}

// Floats or bits to floats or bits. Codes and bits lie at multiples of 8 bytes. No size is 0.
template <typename Launcher>
void launch_binary(BinaryCall c, BinaryPath path, Launcher& launch) {
  if (c.image == nullptr) c.image = pack_binary(c, launch);
  switch (path) {
    case BinaryPath::rows:
      return c.code_words() % 4 == 0 && is_aligned(c.codes, 16) && is_aligned(c.image, 16) ? launch_rows<uint4>(c, launch)
                                                                                           : launch_rows<uint64_t>(c, launch);
    case BinaryPath::small_tiles:
      return launch_tiles<SmallTile>(c, launch);
    case BinaryPath::wide_tiles:
      return launch_tiles<WideTile>(c, launch);
    case BinaryPath::direct:
      return launch_direct(c, launch);
  }
}

}  // namespace quantize::packed
