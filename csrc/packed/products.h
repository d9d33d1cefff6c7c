// Products of images of bytes with panels of weights: row by row by gemm_kernels.h, or in tiles by tile_kernels.h.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "output.h"
#include "scratch.h"
#include "tile_rows.h"

namespace quantize::packed {

// Runs a part of a group's panels over all rows of a sample's image, which are the output's pixels from `pixel` on.
struct Product {
  static constexpr int64_t pair = 2;  // decoded panels that go through the rows together

  const Panels& panels;
  const Epilogue& epilogue;
  const std::vector<int32_t>& rows;
  const std::vector<int32_t>& taps;
  int64_t quads;  // of a tap
  int64_t group_channels;

  // A panel that is filled up to bytes would be multiplied by what lies behind the pixel.
  bool one_row() const { return rows.size() == 1 && taps.size() == 1 && panels.quads == quads; }
  int64_t together() const { return one_row() ? GemmTraits::streams : pair; }
  int64_t parts() const { return (panels.tiles + together() - 1) / together(); }

  void operator()(const uint8_t* image, int64_t group, int64_t part, std::vector<int8_t>& scratch, const Output& out, int64_t sample,
                  int64_t pixel = 0) const {
    const auto& gemm = gemm_kernels();
    const int64_t first = part * together();
    const int64_t tiles = std::min(together(), panels.tiles - first), panel_bytes = panels.quads * GemmTraits::quad_bytes;
    const int64_t begin = first * GemmTraits::columns, columns = std::min(tiles * GemmTraits::columns, group_channels - begin);
    const int64_t channel = group * group_channels + begin, all = int64_t(rows.size());
    int32_t acc[GemmTraits::rows * pair * GemmTraits::columns];
    const Epilogue::Part after(epilogue, channel, columns);
    const auto finish = [&](int64_t i, int64_t count) {
      out(acc, tiles * GemmTraits::columns, count, columns, after, sample, channel, pixel + i);
    };
    if (one_row()) {
      gemm.multiply_row(image + rows[0] + taps[0], panels.tile(group, first), int(tiles), acc);
      return finish(0, 1);
    }
    const int8_t* levels = reinterpret_cast<const int8_t*>(panels.tile(group, first).codes);
    if (panels.bits < 8) {
      scratch.resize(tiles * panel_bytes);
      for (int64_t t = 0; t < tiles; ++t) gemm.decode(panels.tile(group, first + t), scratch.data() + t * panel_bytes);
      levels = scratch.data();
    }
    for (int64_t i = 0; i < all; i += GemmTraits::rows) {
      const int64_t count = std::min<int64_t>(GemmTraits::rows, all - i);
      gemm.multiply(image, &rows[i], int(count), taps.data(), int(taps.size()), quads, levels, panel_bytes, int(tiles), panels.steps, acc);
      finish(i, count);
    }
  }
};

// The same in tiles.
struct TileProduct {
  const Panels& panels;
  const Epilogue& epilogue;
  const TileRows rows;
  const TileTaps taps;
  const std::vector<int32_t> lines;  // where the taps' lines begin
  int64_t group_channels;

  int64_t parts() const { return (panels.tiles + TileTraits::together - 1) / TileTraits::together; }

  // A part's levels, line by line in whole tiles.
  const int8_t* levels(int64_t group, int64_t first, int64_t tiles, std::vector<int8_t>& scratch) const {
    if (panels.bits == 8 && !taps.filled() && panels.bytes == taps.panel_bytes())
      return reinterpret_cast<const int8_t*>(panels.tile(group, first).codes);
    const int64_t stored = panels.quads * GemmTraits::quad_bytes, line = taps.quads * GemmTraits::quad_bytes;
    const int64_t whole = taps.panel_bytes();
    int8_t* made = aligned(at_least(scratch, tiles * whole + stored + 64));
    for (int64_t t = 0; t < tiles; ++t) {
      const auto panel = panels.tile(group, first + t);
      int8_t* target = made + t * whole;
      const int8_t* decoded = reinterpret_cast<const int8_t*>(panel.codes);  // of 8 bits: they are levels
      if (panels.bits != 8) {
        int8_t* place = taps.filled() || stored != whole ? made + tiles * whole : target;
        gemm_kernels().decode(panel, place);
        decoded = place;
      }
      if (decoded == target) continue;
      for (int64_t l = 0; l < taps.lines; ++l) {
        const int64_t pitch = whole / taps.lines;
        std::memcpy(target + l * pitch, decoded + l * line, line);
        std::memset(target + l * pitch + line, 0, pitch - line);
      }
    }
    return made;
  }

  void operator()(const uint8_t* image, int64_t group, int64_t part, std::vector<int8_t>& scratch, const Output& out, int64_t sample,
                  int64_t = 0) const {
    const int64_t first = part * TileTraits::together, tiles = std::min<int64_t>(TileTraits::together, panels.tiles - first);
    const int64_t begin = first * TileTraits::columns, columns = std::min(tiles * TileTraits::columns, group_channels - begin);
    const Epilogue::Part after(epilogue, group * group_channels + begin, columns);
    const int8_t* weights = levels(group, first, tiles, scratch);
    const auto& kernels = *tile_kernels();
    const int64_t pitch = tiles * TileTraits::columns;
    alignas(64) int32_t acc[TileTraits::together * TileTraits::rows * TileTraits::together * TileTraits::columns];
    rows.blocks([&](int64_t offset, int row_tiles, const auto& runs) {
      kernels.multiply(image + offset, rows.stride, row_tiles, {lines.data(), taps.lines, taps.chunks}, weights, int(tiles), acc);
      runs([&](int64_t row, int64_t count, int64_t pixel) {
        out(acc + row * pitch, pitch, count, columns, after, sample, group * group_channels + begin, pixel);
      });
    });
  }
};

// run(item, scratch) for each item, on all threads, in tiles where there are any.
template <typename Run>
void share_out(int64_t items, const Run& run) {
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> scratch;
    const TileSession tiles(tile_kernels());
    for (int64_t item = begin; item < end; ++item) run(item, scratch);
  });
}

}  // namespace quantize::packed
