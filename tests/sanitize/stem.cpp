// First convolutions by minimal filtering: against plain sums.
#include "packed/stem_kernels.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::packed;

constexpr int columns = StemTraits::columns;

// The taps' polynomial at a point, over the product of the point's distances from the others: quantize/packed/stems.py.
double at_point(const double taps[4], int point) {
  constexpr double points[] = {0, 1, -1, 2, -2, 0.5};
  if (point == 6) return taps[3];
  double value = 0, apart = 1;
  for (int j = 3; j >= 0; --j) value = value * points[point] + taps[j];
  for (int p = 0; p < 6; ++p)
    if (p != point) apart *= points[point] - points[p];
  return value / apart;
}

// A line of tiles of one channel.
int64_t check_tiles(Fence fence, int64_t height, int64_t width, int64_t out_width, int64_t panels) {
  const StemKernels& kernels = *stem_kernels();
  const StemSizes s(height, width, 1, out_width);
  constexpr int64_t lines = StemTraits::lines, tile = StemTraits::tile;
  const int64_t outputs = tile * s.tiles, pitch = panels * columns, taps = height * width, room = s.pixels();
  const Buffer<float> pixels(lines * room, fence), apart(8 * (s.pitch + 16), fence), sums(kernels.most_sums, fence);
  const Buffer<float> kernel(pitch * taps, fence), weights(panels * s.steps() * columns, fence), bias(pitch, fence);
  const Buffer<float> transformed(lines * s.line(), fence), v(2 * StemTraits::points * s.line(), fence), out(tile * outputs * pitch, fence);
  for (int64_t i = 0; i < lines * room; ++i) pixels[i] = float(quantize::hash32(uint32_t(i)) >> 24) / 64 - 2;
  for (size_t i = 0; i < apart.bytes() / sizeof(float); ++i) apart[i] = 0;  // what is read behind the last tile is multiplied in vain
  for (int64_t i = 0; i < pitch * taps; ++i) kernel[i] = float(quantize::hash32(uint32_t(i) + 99) >> 24) / 128 - 1;
  for (int64_t n = 0; n < pitch; ++n) {
    bias[n] = float(n);
    float* to = weights.data() + n / columns * s.steps() * columns + n % columns;
    for (int across = 0; across < StemTraits::points; ++across)
      for (int point = 0; point < StemTraits::points; ++point)
        for (int64_t odd_line = 0; odd_line < s.lines(across); ++odd_line)
          for (int64_t odd = 0; odd < (point < 6 ? 2 : s.last); ++odd, to += columns) {
            double own[4] = {};
            for (int64_t l = odd_line; l < height; l += 2) {
              double line[4] = {};
              for (int64_t k = odd; k < width; k += 2) line[k / 2] = kernel[n * taps + l * width + k];
              own[l / 2] = at_point(line, point);
            }
            *to = float(at_point(own, across));
          }
  }
  const float* each[lines];
  for (int64_t l = 0; l < lines; ++l) {
    kernels.transform(pixels.data() + l * room, s, s.pitch, apart.data(), transformed.data() + l * s.line());
    each[l] = transformed.data() + l * s.line();
  }
  kernels.transform_lines(each, s, v.data());
  constexpr float low = -20, high = 50;
  kernels.multiply(v.data(), s, weights.data(), panels, {bias.data(), low, high}, sums.data(), out.data(), outputs * pitch);
  const int64_t channels = pitch - 3;
  const Buffer<float> planes(channels * tile * outputs, fence);
  kernels.turn(out.data(), tile * outputs, pitch, channels, planes.data(), tile * outputs);
  for (int64_t i = 0; i < tile * outputs; ++i)
    for (int64_t n = 0; n < pitch; ++n) {
      double want = bias[n];
      for (int64_t l = 0; l < height; ++l)
        for (int64_t k = 0; k < width; ++k)
          want += double(pixels[(i / outputs * 2 + l) * room + i % outputs * 2 + k]) * kernel[n * taps + l * width + k];
      const float got = out[i * pitch + n];
      want = std::clamp(want, double(low), double(high));
      if (!(std::fabs(got - want) < 1e-3) || (n < channels && planes[n * tile * outputs + i] != got))
        fail("stem: kernel " + std::to_string(height) + " x " + std::to_string(width) + ", output " + std::to_string(i) + " of " +
             std::to_string(out_width) + ", channel " + std::to_string(n) + " is " + std::to_string(got) + ", expected " +
             std::to_string(want));
    }
  return 2;
}

}  // namespace

int64_t check_stem(quantize::Isa isa, Fence fence) {
  quantize::set_cpu_isa(isa);
  if (!stem_kernels()) return 0;
  int64_t count = 0;
  for (const auto& [height, width] : {std::pair{5, 8}, {6, 5}, {7, 7}, {8, 6}})
    for (int64_t out_width : {1, 4, 23, 57, 64, 112})
      for (int64_t panels : {1, 2, 3}) count += check_tiles(fence, height, width, out_width, panels);
  return count;
}

}  // namespace sanitize
