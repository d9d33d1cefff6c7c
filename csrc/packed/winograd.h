// 3x3 convolutions of an image of bytes by winograd_kernels.h.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "conv_geometry.h"
#include "output.h"
#include "winograd_kernels.h"

namespace quantize::packed {

class Winograd {
 public:
  // Whether it takes this convolution, and fewer products for it. Few tiles would not repay the transform of the weights.
  static bool takes(const Panels& panels, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef dilation, int64_t group_inputs,
                    int64_t out_height, int64_t out_width) {
    const int64_t tiles = (out_height + 1) / 2 * ((out_width + 1) / 2);
    const auto all = [](at::IntArrayRef two, int64_t value) { return two[0] == value && two[1] == value; };
    return winograd_kernels() && panels.steps <= most_steps && all(kernel, 3) && all(stride, 1) && all(dilation, 1) &&
           tiles >= fewest_tiles && group_inputs >= Traits::lanes && group_inputs <= Traits::most_channels;
  }

  // Bytes behind an image that tiles at its edge read.
  static int64_t behind(int64_t line, int64_t pixel) { return line + 2 * pixel + Traits::lanes; }

  // line, pixel: bytes of the padded image's.
  Winograd(const Panels& panels, const Epilogue& epilogue, const Geometry<int64_t>& sizes, int64_t groups, int64_t line, int64_t pixel)
      : panels_(panels), epilogue_(epilogue), g_(sizes), groups_(groups), line_(line), pixel_(pixel) {
    wide_ = (g_.out_width + 1) / 2;
    for (int64_t y = 0; y < g_.out_height; y += 2)
      for (int64_t x = 0; x < g_.out_width; x += 2) tiles_.push_back(int32_t(y * line + x * pixel));
    channels_ = (pixel + Traits::lanes - 1) / Traits::lanes * Traits::lanes;
  }

  // images: of each sample and group, `plane` bytes.
  void operator()(const uint8_t* images, int64_t plane, const Output& out) const {
    const int64_t count = int64_t(tiles_.size()), transformed = positions * count * channels_;
    const int64_t together = std::clamp<int64_t>(most_transformed / (transformed * groups_), 1, g_.batch);  // samples
    std::vector<int16_t> v(together * groups_ * transformed);
    for (int64_t sample = 0; sample < g_.batch; sample += together) {
      const int64_t some = std::min(together, g_.batch - sample) * groups_, blocks = (count + Traits::block - 1) / Traits::block;
      const uint8_t* image = images + sample * groups_ * plane;
      at::parallel_for(0, some * blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t s = item / blocks, first = item % blocks * Traits::block;
          winograd_kernels()->transform_pixels(image + s * plane, &tiles_[first], std::min<int64_t>(Traits::block, count - first), line_,
                                               pixel_, channels_, v.data() + s * transformed + first * channels_, count * channels_);
        }
      });
      // Panels are shared out; where they are fewer than threads, tiles are as well.
      const int64_t items = groups_ * panels_.tiles;
      const int64_t shares = std::clamp<int64_t>((at::get_num_threads() + items - 1) / items, 1, blocks);
      at::parallel_for(0, items * shares, 1, [&](int64_t begin, int64_t end) {
        std::vector<int16_t> u(positions * channels_ * Traits::columns);
        std::vector<int8_t> decoded;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t part = item / shares, group = part / panels_.tiles, panel = part % panels_.tiles;
          if (item == begin || item % shares == 0) transform(group, panel, decoded, u.data());
          const int64_t first = item % shares * blocks / shares, last = (item % shares + 1) * blocks / shares;
          for (int64_t s = group; s < some; s += groups_)
            run(v.data() + s * transformed, sample + s / groups_, group, panel, first, last, u.data(), out);
        }
      });
    }
  }

 private:
  using Traits = WinogradTraits;
  static constexpr int64_t positions = 16, fewest_tiles = 4;
  static constexpr int most_steps = 4;                           // levels of 5 bits: smaller ones add up in 16 bits, which is as fast
  static constexpr int64_t most_transformed = int64_t(1) << 19;  // of transformed pixels at a time, a megabyte

  void transform(int64_t group, int64_t panel, std::vector<int8_t>& decoded, int16_t* u) const {
    const Weights weights = panels_.tile(group, panel);
    const int8_t* levels = reinterpret_cast<const int8_t*>(weights.codes);
    if (weights.bits < 8) {
      decoded.resize(panels_.quads * GemmTraits::quad_bytes);
      gemm_kernels().decode(weights, decoded.data());
      levels = decoded.data();
    }
    winograd_kernels()->transform_weights(levels, pixel_ / GemmTraits::quad, channels_, u);
  }

  // A panel's outputs of a sample: blocks [first, last) of its tiles.
  void run(const int16_t* v, int64_t sample, int64_t group, int64_t panel, int64_t first, int64_t last, const int16_t* u,
           const Output& out) const {
    constexpr int64_t pitch = 2 * Traits::block * Traits::columns;
    alignas(32) int32_t sums[2 * pitch];
    const int64_t count = int64_t(tiles_.size()), group_channels = g_.out_channels / groups_, begin = panel * Traits::columns;
    const int64_t columns = std::min<int64_t>(Traits::columns, group_channels - begin), channel = group * group_channels + begin;
    if (columns <= 0) return;
    const Epilogue::Part after(epilogue_, channel, columns);
    for (int64_t tile = first * Traits::block; tile < std::min(count, last * Traits::block);) {
      const int64_t some = std::min<int64_t>(Traits::block, count - tile), end = tile + some;
      winograd_kernels()->multiply(v + tile * channels_, count * channels_, some, channels_, u, sums, pitch);
      for (const int64_t start = tile; tile < end;) {  // lines of tiles
        const int64_t y = tile / wide_ * 2, x = tile % wide_ * 2, line = std::min(end - tile, wide_ - tile % wide_);
        for (int64_t below = 0; below < std::min<int64_t>(2, g_.out_height - y); ++below)
          out(sums + below * pitch + (tile - start) * 2 * Traits::columns, Traits::columns, std::min(2 * line, g_.out_width - x), columns,
              after, sample, channel, (y + below) * g_.out_width + x);
        tile += line;
      }
    }
  }

  const Panels& panels_;
  const Epilogue& epilogue_;
  const Geometry<int64_t>& g_;
  const int64_t groups_, line_, pixel_;
  int64_t wide_, channels_;     // tiles of a line; input channels, filled up
  std::vector<int32_t> tiles_;  // where they begin in an image
};

}  // namespace quantize::packed
