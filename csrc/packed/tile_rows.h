// How the output pixels of a convolution become rows of tiles. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile_kernels.h"

namespace quantize::packed {

// Rows of a tile lie at equal distances. The pixels of one line of the output do; so do those of all lines if what lies between the lines
// in the padded image is taken along and left out afterwards. Whatever makes fewer tiles.
struct TileRows {
  int64_t stride;                   // bytes from row to row
  int64_t segments, segment_bytes;  // from one segment's first row to the next one's
  int64_t length;                   // rows of a segment
  int64_t period, kept;             // the first `kept` of every `period` rows are pixels

  static constexpr int64_t slack = TileTraits::together * TileTraits::rows;  // rows that may be read behind the last

  // pixel, line: bytes of the image. stride: of the convolution.
  TileRows(int64_t out_height, int64_t out_width, int64_t pixel, int64_t line, const int64_t* steps) : stride(steps[1] * pixel) {
    const int64_t down = steps[0] * line, whole = (out_height - 1) * (down / stride) + out_width;
    kept = out_width;
    if (out_height > 1 && down % stride == 0 && tiles(whole) <= out_height * tiles(out_width))
      segments = 1, segment_bytes = 0, length = whole, period = down / stride;
    else
      segments = out_height, segment_bytes = down, length = out_width, period = out_width;
  }

  static int64_t tiles(int64_t rows) { return (rows + TileTraits::rows - 1) / TileTraits::rows; }

  // use(offset, row_tiles, runs): the bytes at which a block of rows begins, and runs(each), which calls each(first, count, pixel) for
  // what is to be kept of the block's rows.
  template <typename Use>
  void blocks(const Use& use) const {
    constexpr int64_t most = TileTraits::together * TileTraits::rows;
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t i = 0; i < length; i += most) {
        const int64_t end = std::min(i + most, length);
        use(s * segment_bytes + i * stride, int(tiles(end - i)), [&](const auto& each) {
          int64_t within = i % period, pixel = (s * (length / period) + i / period) * kept;
          for (int64_t at = i; at < end; within = 0, pixel += kept) {
            const int64_t until = std::min(end, at - within + kept);
            if (at < until) each(at - i, until - at, pixel + within);
            at += period - within;
          }
        });
      }
  }
};

// Where a kernel's taps lie, and how panels of their quads become levels in tiles: taps of one line that lie together are one run of bytes,
// filled up to tiles with zeros.
struct TileTaps {
  int64_t lines, quads, chunks;  // quads: of a line, without the filling

  TileTaps(const int64_t* kernel, int64_t dilation, int64_t tap_quads)
      : lines(dilation == 1 ? kernel[0] : kernel[0] * kernel[1]),
        quads(dilation == 1 ? kernel[1] * tap_quads : tap_quads),
        chunks((quads + TileTraits::quads - 1) / TileTraits::quads) {}

  // Where they begin. line: bytes of the image. dilation: of both dimensions.
  std::vector<int32_t> offsets(const int64_t* kernel, const int64_t* dilation, int64_t pixel, int64_t line) const {
    std::vector<int32_t> found;
    for (int64_t h = 0; h < kernel[0]; ++h)
      for (int64_t w = 0; w < lines / kernel[0]; ++w) found.push_back(int32_t(h * dilation[0] * line + w * dilation[1] * pixel));
    return found;
  }
  bool filled() const { return quads % TileTraits::quads != 0; }
  int64_t panel_bytes() const { return lines * chunks * TileTraits::quads * TileTraits::bytes; }
};

}  // namespace quantize::packed
