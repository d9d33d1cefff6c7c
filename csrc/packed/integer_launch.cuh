// Which kernels an integer layer takes on the device, and their launches.
#pragma once

#include "integer_tiles.cuh"

namespace quantize::packed {

enum class IntegerPath { rows, small_tiles, wide_tiles };

inline bool takes(const IntegerCall& c, IntegerPath path) {
  if (path != IntegerPath::rows) return true;
  return c.taps() == 1 && c.pixels() == c.batch && c.groups == 1 && c.batch <= DeviceInteger::most_rows;
}

template <typename Tile>
int64_t tiles(const IntegerCall& c) {
  return (c.out_rows() + Tile::m - 1) / Tile::m * c.groups * ((c.outputs() + Tile::n - 1) / Tile::n);
}

inline IntegerPath integer_path(const IntegerCall& c, int processors) {
  if (takes(c, IntegerPath::rows)) return IntegerPath::rows;
  return c.outputs() > SmallTile::n && tiles<WideTile>(c) >= processors ? IntegerPath::wide_tiles : IntegerPath::small_tiles;
}

// Whether kernels can count a layer's words, pixels and tiles in 32 bits, and some blocks' steps beyond them.
inline bool is_countable(const IntegerCall& c) {
  constexpr int64_t most = int64_t(1) << 30;
  const auto below = [](int64_t a, int64_t b) { return a == 0 || b <= (most - 1) / a; };
  return below(c.padded_height(), c.padded_width()) && below(int64_t(c.padded_height()) * c.padded_width(), c.batch) &&
         below(c.pixels(), c.pixel_words()) && below(c.out_height, c.out_width) && below(c.out_pixels(), c.batch) &&
         below(int64_t(c.kernel[0]) * c.kernel[1], c.inputs()) && below(c.row_words(), c.out_channels) && tiles<SmallTile>(c) < most;
}

// The image of `c.floats`.
template <typename Launcher>
const uint32_t* pack_integer(const IntegerCall& c, Launcher& launch) {
  const int words = c.pixel_words(), pixels = int(c.pixels()), threads = DeviceInteger::threads, some = DeviceInteger::words_at_once;
  const ImageDividers by{Divider(c.padded_height() * c.padded_width()), Divider(c.padded_width()), Divider(words), Divider(c.tap_words())};
  uint32_t* image = launch.template scratch<uint32_t>(int64_t(pixels) * words);
  const auto grid = [&](int64_t items) { return unsigned(grid_size(launch.processors(), DeviceInteger::blocks, items, threads)); };
  if (c.together || c.height * c.width == 1)
    launch(pack_integer_rows, dim3(grid(int64_t(pixels) * words)), threads, c, by, pixels * words,
           c.inputs() % 4 == 0 && is_aligned(c.floats, 16), image);
  else
    launch(pack_integer_planes, dim3(grid(pixels), unsigned(std::min((words + some - 1) / some, DeviceInteger::most_grid_rows))), threads,
           c, by, pixels, image);
  return image;
}

template <typename Tile, typename Launcher>
void launch_tiles(const IntegerCall& c, Launcher& launch) {
  const uint32_t* image = pack_integer(c, launch);
  const int64_t words = int64_t(c.out_channels) * c.row_words();
  uint32_t* weights = launch.template scratch<uint32_t>(words);
  launch(decode_bytes, dim3(unsigned(grid_size(launch.processors(), DeviceInteger::blocks, words, DeviceInteger::threads))),
         DeviceInteger::threads, c, Divider(c.row_words()), Divider(c.tap_words()), c.code_bytes(), int(words), weights);
  const TileDividers by{Divider(c.out_pixels()), Divider(c.out_width), Divider(c.tap_words()), Divider(c.kernel[1])};
  const auto kernel = c.tap_words() % 4 == 0   ? integer_tiles<Tile, 4>
                      : c.tap_words() % 2 == 0 ? integer_tiles<Tile, 2>
                                               : integer_tiles<Tile, 1>;
  launch(kernel, dim3(unsigned(tiles<Tile>(c))), MmaTraits::threads, c, by, image, static_cast<const uint32_t*>(weights));
}

template <int bits, typename V, typename Launcher>
void launch_rows_of(const IntegerCall& c, Launcher& launch) {
  const auto kernel = c.batch == 1   ? integer_rows<1, bits, V>
                      : c.batch == 2 ? integer_rows<2, bits, V>
                      : c.batch <= 4 ? integer_rows<4, bits, V>
                                     : integer_rows<8, bits, V>;
  const int pitch = int(c.code_bytes() * 2 / bits), words = c.batch * pitch;
  uint32_t* image = launch.template scratch<uint32_t>(words);
  const ImageDividers by{Divider(1), Divider(1), Divider(pitch), Divider(pitch)};  // one group, as long as the codes go
  launch(pack_integer_rows, dim3(unsigned(grid_size(launch.processors(), DeviceInteger::blocks, words, DeviceInteger::threads))),
         DeviceInteger::threads, c, by, words, false, image);
  launch(kernel, dim3(unsigned((c.out_channels + 31) / 32)), DeviceInteger::threads, c, static_cast<const uint32_t*>(image),
         int(c.code_bytes() / sizeof(V)), pitch);
}

template <int bits, typename Launcher>
void launch_rows(const IntegerCall& c, Launcher& launch) {
  const bool wide = c.code_bytes() % 16 == 0 && is_aligned(c.codes, 16);
  return wide ? launch_rows_of<bits, uint4>(c, launch) : launch_rows_of<bits, uint64_t>(c, launch);
}

// Floats to floats. Codes lie at multiples of 8 bytes. No size is 0.
template <typename Launcher>
void launch_integer(const IntegerCall& c, IntegerPath path, Launcher& launch) {
  switch (path) {
    case IntegerPath::rows:
      return c.bits == 2 ? launch_rows<2>(c, launch) : c.bits == 4 ? launch_rows<4>(c, launch) : launch_rows<8>(c, launch);
    case IntegerPath::small_tiles:
      return launch_tiles<SmallTile>(c, launch);
    case IntegerPath::wide_tiles:
      return launch_tiles<WideTile>(c, launch);
  }
}

}  // namespace quantize::packed
