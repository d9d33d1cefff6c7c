// 3x3 convolutions by minimal filtering against plain loops.
#include "packed/winograd_kernels.h"

#include "harness.h"
#include "packed/gemm_kernels.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using Traits = WinogradTraits;

// `count` tiles in a line; all bytes 255 and levels -127, or noise.
int64_t check_line(Fence fence, int64_t channels, int64_t count, bool extreme) {
  const int64_t quads = (channels + 3) / 4, pixel = quads * 4, width = 2 * count + 2, line = width * pixel;
  const int64_t filled = (pixel + Traits::lanes - 1) / Traits::lanes * Traits::lanes, v_plane = count * filled;
  const Noise<uint8_t> image(4 * line + Traits::lanes, fence, 1);
  const Noise<int8_t> levels(9 * quads * GemmTraits::quad_bytes, fence, 2);
  const Buffer<int32_t> tiles(count, fence);
  for (int64_t i = 0; i < count; ++i) tiles[i] = int32_t(2 * i * pixel);
  for (size_t i = 0; i < image.bytes(); ++i)
    if (extreme) image[i] = 255;
  for (size_t i = 0; i < levels.bytes(); ++i) levels[i] = extreme || levels[i] == -128 ? int8_t(-127) : levels[i];
  const Buffer<int16_t> v(16 * v_plane, fence), u(16 * filled * Traits::columns, fence);
  const int64_t pitch = 2 * count * Traits::columns;
  const Buffer<int32_t> got(2 * pitch, fence), want(2 * pitch, fence);
  const WinogradKernels& kernels = *winograd_kernels();
  kernels.transform_pixels(image.data(), tiles.data(), count, line, pixel, filled, v.data(), v_plane);
  kernels.transform_weights(levels.data(), quads, filled, u.data());
  kernels.multiply(v.data(), v_plane, count, filled, u.data(), got.data(), pitch);
  for (int64_t y = 0; y < 2; ++y)
    for (int64_t x = 0; x < 2 * count; ++x)
      for (int64_t n = 0; n < Traits::columns; ++n) {
        int32_t sum = 0;
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t c = 0; c < pixel; ++c)
            sum += image[(y + tap / 3) * line + (x + tap % 3) * pixel + c] *
                   levels[(tap * quads + c / 4) * GemmTraits::quad_bytes + n * 4 + c % 4];
        want[y * pitch + x * Traits::columns + n] = sum;
      }
  expect_same(got, want, "winograd: " + std::to_string(channels) + " channels, " + std::to_string(count) + " tiles");
  return 1;
}

}  // namespace

int64_t check_winograd(quantize::Isa isa, Fence fence) {
  quantize::set_cpu_isa(isa);
  if (!winograd_kernels()) return 0;
  int64_t count = 0;
  for (int64_t channels : {16, 17, 30, 48})
    for (int64_t tiles : {1, 3, 6, 7, Traits::block}) count += check_line(fence, channels, tiles, false);
  return count + check_line(fence, Traits::most_channels / 4 * 4, 4, true);
}

}  // namespace sanitize
