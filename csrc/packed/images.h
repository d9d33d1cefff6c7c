// What convolutions of bytes read.
#pragma once

#include <ATen/Parallel.h>

#include <cstring>
#include <vector>

#include "activation.h"
#include "conv_geometry.h"
#include "gemm_kernels.h"
#include "image_kernels.h"
#include "tile_rows.h"

namespace quantize::packed {

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Images of codes, one a sample and group, with padding around: channels of a pixel together, filled up to quads.
struct Images {
  const Geometry<int64_t>& g;
  at::IntArrayRef padding;
  int64_t groups, inputs;      // inputs: of a group
  int64_t pixel, line, plane;  // bytes
  int64_t steps[2];            // strides. One beyond the image is never taken

  Images(const Geometry<int64_t>& sizes, at::IntArrayRef stride, at::IntArrayRef around, int64_t group_count, int64_t pixel_bytes)
      : g(sizes),
        padding(around),
        groups(group_count),
        inputs(g.channels / groups),
        pixel(pixel_bytes),
        line((g.width + 2 * padding[1]) * pixel),
        plane((g.height + 2 * padding[0]) * line),
        steps{std::min(stride[0], g.height + 2 * padding[0]), std::min(stride[1], g.width + 2 * padding[1])} {}

  int64_t quads() const { return pixel / GemmTraits::quad; }

  // Bytes behind the last image: codes are written four at a time, and tiles read rows and taps that are left out.
  int64_t behind(int64_t kernel_width) const {
    return 64 + (tile_kernels() ? TileRows::slack * steps[1] * pixel + kernel_width * pixel : 0);
  }

  // x: channels last where `rows_layout`, else contiguous.
  void fill(const at::Tensor& x, bool rows_layout, const Activation& act, uint8_t* images) const {
    const float* source = x.const_data_ptr<float>();
    at::parallel_for(0, g.batch * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        uint8_t* image = images + s * plane;
        if (padding[0] || padding[1] || pixel != inputs) std::memset(image, act.zero_point, plane);
        uint8_t* inner = image + padding[0] * line + padding[1] * pixel;
        const int64_t sample = s / groups, first = s % groups * inputs;
        if (!rows_layout) {
          image_kernels().from_planes(source + (sample * g.channels + first) * g.height * g.width, g.height * g.width, inputs, g.height,
                                      g.width, act.range, inner, line, pixel);
          continue;
        }
        for (int64_t h = 0; h < g.height; ++h)
          image_kernels().from_rows(source + (sample * g.height + h) * g.width * g.channels + first, g.channels, inputs, g.width, act.range,
                                    act.zero_point, inner + h * line, pixel);
      }
    });
  }

  // x: codes already, pixels of `filled` bytes.
  void copy(const uint8_t* x, int64_t filled, int zero_point, uint8_t* images) const {
    at::parallel_for(0, g.batch * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        uint8_t* image = images + s * plane;
        if (padding[0] || padding[1] || pixel != inputs) std::memset(image, zero_point, plane);
        const uint8_t* source = x + s / groups * g.height * g.width * filled + s % groups * inputs;
        for (int64_t h = 0; h < g.height; ++h) {
          uint8_t* target = image + (h + padding[0]) * line + padding[1] * pixel;
          const uint8_t* from = source + h * g.width * filled;
          if (pixel == filled)
            std::memcpy(target, from, g.width * pixel);
          else
            for (int64_t w = 0; w < g.width; ++w) std::memcpy(target + w * pixel, from + w * filled, inputs);
        }
      }
    });
  }

  // Where the windows of the output's pixels begin, and a window's taps in it.
  std::vector<int32_t> rows() const {
    std::vector<int32_t> found;
    found.reserve(g.out_height * g.out_width);
    for (int64_t h = 0; h < g.out_height; ++h)
      for (int64_t w = 0; w < g.out_width; ++w) found.push_back(int32_t(h * steps[0] * line + w * steps[1] * pixel));
    return found;
  }
  std::vector<int32_t> taps(at::IntArrayRef kernel, at::IntArrayRef dilation) const {
    std::vector<int32_t> found;
    for (int64_t h = 0; h < kernel[0]; ++h)
      for (int64_t w = 0; w < kernel[1]; ++w) found.push_back(int32_t(h * dilation[0] * line + w * dilation[1] * pixel));
    return found;
  }
};

}  // namespace quantize::packed
