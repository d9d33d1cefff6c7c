// First convolutions by minimal filtering: against plain sums.
#include "packed/stem_kernels.h"

#include <cmath>

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

// One channel, a kernel of two lines.
int64_t check_line(Fence fence, int64_t width, int64_t out_width, int64_t panels) {
  const StemKernels& kernels = *stem_kernels();
  const StemLines lines(2, width, 1, out_width);
  const int64_t outputs = StemTraits::tile * lines.tiles, pitch = panels * columns;
  const Buffer<float> pixels(2 * lines.pixels(), fence), apart(8 * (lines.pitch + 16), fence), sums(kernels.most_sums, fence);
  const Buffer<float> taps(pitch * 2 * width, fence), weights(panels * lines.steps() * columns, fence), bias(pitch, fence);
  const Buffer<float> first(lines.floats(), fence), second(lines.floats(), fence), out(outputs * pitch, fence);
  const float* v[] = {first.data(), second.data()};
  for (int64_t i = 0; i < 2 * lines.pixels(); ++i) pixels[i] = float(quantize::hash32(uint32_t(i)) >> 24) / 64 - 2;
  for (size_t i = 0; i < apart.bytes() / sizeof(float); ++i) apart[i] = 0;  // what is read behind the last tile is multiplied in vain
  for (int64_t i = 0; i < pitch * 2 * width; ++i) taps[i] = float(quantize::hash32(uint32_t(i) + 99) >> 24) / 128 - 1;
  for (int64_t n = 0; n < pitch; ++n) {
    bias[n] = float(n);
    float* to = weights.data() + n / columns * lines.steps() * columns + n % columns;
    for (int point = 0; point < StemTraits::points; ++point)
      for (int64_t l = 0; l < 2; ++l)
        for (int64_t odd = 0; odd < (point < 6 ? 2 : lines.last); ++odd, to += columns) {
          double own[4] = {};
          for (int64_t k = odd; k < width; k += 2) own[k / 2] = taps[(n * 2 + l) * width + k];
          *to = float(at_point(own, point));
        }
  }
  kernels.transform(pixels.data(), lines, lines.pitch, apart.data(), first.data());
  kernels.transform(pixels.data() + lines.pixels(), lines, lines.pitch, apart.data(), second.data());
  kernels.multiply(v, lines, weights.data(), bias.data(), panels, sums.data(), out.data());
  const int64_t channels = pitch - 3;
  const Buffer<float> planes(channels * outputs, fence);
  kernels.turn(out.data(), outputs, pitch, channels, planes.data(), outputs);
  for (int64_t i = 0; i < outputs; ++i)
    for (int64_t n = 0; n < pitch; ++n) {
      double want = bias[n];
      for (int64_t l = 0; l < 2; ++l)
        for (int64_t k = 0; k < width; ++k) want += double(pixels[l * lines.pixels() + 2 * i + k]) * taps[(n * 2 + l) * width + k];
      const float got = out[i * pitch + n];
      if (!(std::fabs(got - want) < 1e-4) || (n < channels && planes[n * outputs + i] != got))
        fail("stem: kernel " + std::to_string(width) + ", output " + std::to_string(i) + " of " + std::to_string(out_width) + ", channel " +
             std::to_string(n) + " is " + std::to_string(got) + ", expected " + std::to_string(want));
    }
  return 2;
}

}  // namespace

int64_t check_stem(quantize::Isa isa, Fence fence) {
  quantize::set_cpu_isa(isa);
  if (!stem_kernels()) return 0;
  int64_t count = 0;
  for (int64_t width : {5, 6, 7, 8})
    for (int64_t out_width : {1, 4, 23, 57, 64, 112})
      for (int64_t panels : {1, 2, 3}) count += check_line(fence, width, out_width, panels);
  return count;
}

}  // namespace sanitize
