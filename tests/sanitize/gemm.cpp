// Integer products of packed weights, and activations in and out of them: every ISA's are the portable ones, bit for bit.
#include "packed/gemm_kernels.h"

#include <algorithm>

#include "harness.h"
#include "packed/image_kernels.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

// Codes of a panel and the table they are looked up in.
int64_t check_products(Isa isa, Fence fence, int bits, int largest, int64_t channels, int tap_count, int64_t pixels) {
  const int share = 8 / bits;
  const int64_t quads = (channels + 3) / 4, stored = (quads * tap_count + share - 1) / share * share, pixel = quads * 4;
  const Noise<uint8_t> codes(stored / share * GemmTraits::quad_bytes * GemmTraits::streams, fence, 1);
  alignas(16) int8_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = int8_t(int(quantize::hash32(uint32_t(i) + 7) % (2 * largest + 1)) - largest);
  const int steps = 32767 / (2 * 255 * largest);
  const Noise<uint8_t> image(std::max(pixels + tap_count, stored) * pixel + 16, fence, 2);
  const Noise<int8_t> floats(stored * 4, fence, 3);
  const Buffer<float> x(stored * 4, fence);
  for (int64_t i = 0; i < stored * 4; ++i) x[i] = float(floats[i]) * 0.37f;
  const Buffer<int32_t> rows(pixels, fence), taps(tap_count, fence);
  for (int64_t i = 0; i < pixels; ++i) rows[i] = int32_t(i * pixel);
  for (int t = 0; t < tap_count; ++t) taps[t] = int32_t(t * pixel);
  const int64_t panel_bytes = stored * GemmTraits::quad_bytes;
  const std::string what = "gemm: " + std::to_string(bits) + " bits, levels to " + std::to_string(largest) + ", channels " +
                           std::to_string(channels) + ", taps " + std::to_string(tap_count) + ", rows " + std::to_string(pixels);
  int64_t count = 0;
  const auto run = [&](Isa which, const Buffer<int8_t>& levels, const Buffer<int32_t>& acc, const Buffer<float>& float_acc) {
    quantize::set_cpu_isa(which);
    const auto& gemm = gemm_kernels();
    for (int t = 0; t < 2; ++t) {
      const Weights w{codes.data() + t * codes.bytes() / GemmTraits::streams, stored, bits, table, steps};
      gemm.decode(w, levels.data() + t * panel_bytes);
      gemm.multiply_row_float(x.data(), w, float_acc.data() + t * 16);
    }
    int32_t* out = acc.data();
    for (int tiles : {GemmTraits::streams, 1}) {
      gemm.multiply_row(image.data(), {codes.data(), stored, bits, table, steps}, tiles, out);
      out += tiles * GemmTraits::columns;
    }
    for (int tiles : {2, 1}) {
      gemm.multiply(image.data(), rows.data(), int(pixels), taps.data(), tap_count, quads, levels.data(), panel_bytes, tiles, steps, out);
      out += tiles * GemmTraits::columns * pixels;
    }
  };
  const Buffer<int8_t> levels(2 * panel_bytes, fence), want_levels(2 * panel_bytes, fence);
  const int64_t sums = (GemmTraits::streams + 1 + 3 * pixels) * GemmTraits::columns;
  const Buffer<int32_t> acc(sums, fence), want(sums, fence);
  const Buffer<float> float_acc(32, fence), want_float(32, fence);
  run(isa, levels, acc, float_acc);
  run(Isa::portable, want_levels, want, want_float);
  expect_same(levels, want_levels, what + ", levels");
  expect_same(acc, want, what);
  expect_same(float_acc, want_float, what + ", float");
  return ++count;
}

// Sums to planes, which some ISAs turn block by block.
int64_t check_planes(Isa isa, Fence fence, int64_t rows, int64_t columns) {
  const int64_t pitch = columns + 1, plane = rows + 3;
  const Noise<int32_t> acc(rows * pitch, fence, 3), correction(columns, fence, 4);
  const Buffer<float> gain(columns, fence), bias(columns, fence);
  for (int64_t i = 0; i < rows * pitch; ++i) acc[i] >>= 9;
  for (int64_t c = 0; c < columns; ++c) correction[c] >>= 9, gain[c] = 0.37f * float(c - 5), bias[c] = 1.3f * float(c);
  const Buffer<float> out(columns * plane, fence), want(columns * plane, fence), residual(columns * plane, fence);
  for (int64_t i = 0; i < columns * plane; ++i) residual[i] = 0.7f * float(i) - 30;
  quantize::set_cpu_isa(isa);
  for (const float* more : {static_cast<const float*>(nullptr), static_cast<const float*>(residual.data())}) {
    image_kernels().finish(acc.data(), pitch, rows, columns, correction.data(), gain.data(), bias.data(), more, out.data(), 1, plane);
    image_portable.finish(acc.data(), pitch, rows, columns, correction.data(), gain.data(), bias.data(), more, want.data(), 1, plane);
    expect_same(out, want, "image: planes of " + std::to_string(rows) + " rows, " + std::to_string(columns) + " columns");
  }
  return 2;
}

int64_t check_images(Isa isa, Fence fence, int64_t channels, int64_t width) {
  constexpr int64_t height = 3;
  const int64_t pixel = (channels + 3) / 4 * 4, plane = height * width;
  Buffer<F32> x(channels * plane, fence);
  const Buffer<int32_t> acc(plane * 32, fence), correction(channels, fence);
  const Buffer<float> gain(channels, fence), bias(channels, fence);
  for (int64_t i = 0; i < plane * 32; ++i) acc[i] = int32_t(quantize::hash32(uint32_t(i)) >> 8);
  for (int64_t c = 0; c < channels; ++c) correction[c] = int32_t(c * 100), gain[c] = 0.01f * float(c + 1), bias[c] = float(c);
  int64_t count = 0;
  for (Pattern pattern : kPatterns) {
    fill(x, pattern);
    const auto* values = reinterpret_cast<const float*>(x.data());
    const auto run = [&](Isa which, const Buffer<uint8_t>& image, const Buffer<float>& out) {
      quantize::set_cpu_isa(which);
      const auto& kernels = image_kernels();
      const auto range = quantize::weight::lsq_range(0.05f, 7.f, 255);
      kernels.from_planes(values, plane, channels, height, width, range, image.data(), width * pixel, pixel);
      kernels.from_rows(values, channels, channels, plane, range, 7, image.data() + plane * pixel, pixel);
      kernels.finish(acc.data(), 32, plane, std::min<int64_t>(channels, 32), correction.data(), gain.data(), bias.data(), nullptr,
                     out.data(), channels, 1);
      kernels.finish(acc.data(), 32, plane, std::min<int64_t>(channels, 32), correction.data(), gain.data(), bias.data(), values,
                     out.data() + plane * channels, 1, plane);
      kernels.finish_codes(acc.data(), 32, plane, std::min<int64_t>(channels, 32), correction.data(), gain.data(), bias.data(), range, 7,
                           image.data() + 2 * plane * pixel, pixel);
      kernels.finish_clipped(acc.data(), 32, plane, std::min<int64_t>(channels, 32), correction.data(), gain.data(), bias.data(), nullptr,
                             -1e6f, 3e6f, out.data() + 2 * plane * channels, channels);
      kernels.finish_clipped(acc.data(), 32, plane, std::min<int64_t>(channels, 32), correction.data(), gain.data(), bias.data(), values,
                             0.f, 3e6f, out.data() + 3 * plane * channels, channels);
      kernels.add_and_clip(out.data() + plane * channels, values, plane, channels, channels, 0.f, 6.f);
    };
    const Buffer<uint8_t> image(3 * plane * pixel, fence), want_image(3 * plane * pixel, fence);
    const Buffer<float> out(4 * plane * channels, fence), want(4 * plane * channels, fence);
    run(isa, image, out);
    run(Isa::portable, want_image, want);
    const std::string what =
        "image: channels " + std::to_string(channels) + ", width " + std::to_string(width) + ", " + kPatternNames[int(pattern)];
    expect_same(image, want_image, what);
    expect_same(out, want, what + ", out");
    ++count;
  }
  return count;
}

// Channels of wider pixels, as groups have them; the fill-up is zero.
int64_t check_pixels(Isa isa, Fence fence, int64_t pixel, int64_t channels, int64_t pixels) {
  quantize::set_cpu_isa(isa);
  const int64_t pixel_bytes = (channels + 3) / 4 * 4;
  const auto range = quantize::weight::lsq_range(0.05f, 7.f, 255);
  Buffer<F32> x((pixels - 1) * pixel + channels, fence);
  const Buffer<uint8_t> got(pixels * pixel_bytes, fence), want(pixels * pixel_bytes, fence);
  for (Pattern pattern : kPatterns) {
    fill(x, pattern);
    for (int64_t i = 0; i < pixels * pixel_bytes; ++i) {
      const int64_t c = i % pixel_bytes;
      if (c >= channels) {
        want[i] = 0;
        continue;
      }
      const float v = x[i / pixel_bytes * pixel + c].value;
      const float level = quantize::weight::lsq_clip(quantize::weight::lsq_round(quantize::weight::lsq_divide(v, range)), range);
      want[i] = uint8_t(v != v ? 0 : int(level - range.low));
    }
    image_kernels().from_rows(reinterpret_cast<const float*>(x.data()), pixel, channels, pixels, range, 7, got.data(), pixel_bytes);
    expect_same(
        got, want,
        "pixels: " + std::to_string(channels) + " of " + std::to_string(pixel) + " channels, pattern " + kPatternNames[int(pattern)]);
  }
  return 1;
}

}  // namespace

int64_t check_gemm(Isa isa, Fence fence) {
  int64_t count = 0;
  for (const auto& [bits, largest] : {std::pair{2, 1}, {2, 64}, {4, 7}, {4, 64}, {8, 128}})
    for (int64_t channels : {1, 4, 17, 300})
      for (int taps : {1, 3, 9})
        for (int64_t rows : {1, 3, 12}) count += check_products(isa, fence, bits, largest, channels, taps, rows);
  for (int64_t channels : {1, 3, 4, 17, 32})
    for (int64_t width : {1, 15, 16, 33}) count += check_images(isa, fence, channels, width);
  for (int64_t rows : {1, 15, 16, 17, 32})
    for (int64_t columns : {1, 16, 23, 32}) count += check_planes(isa, fence, rows, columns);
  for (const auto& [pixel, channels] : {std::pair{1, 1}, {3, 3}, {15, 15}, {16, 16}, {24, 8}, {24, 17}, {40, 5}, {64, 32}})
    for (int64_t pixels : {1, 2, 31, 33, 70}) count += check_pixels(isa, fence, pixel, channels, pixels);
  return count;
}

}  // namespace sanitize
