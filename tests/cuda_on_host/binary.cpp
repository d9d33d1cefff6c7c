// Binary layers: every path that takes a layer, bit for bit what a loop over the weights gives.
#include "packed/binary_launch.cuh"

#include "harness.h"
#include "layers.h"

namespace cuda_on_host {
namespace {

using namespace quantize::packed;

int sign(uint32_t i) { return quantize::hash32(i) & 1 ? -1 : 1; }
void set_bit(uint32_t* row, int64_t at) { row[at / 32] |= 1u << (at % 32); }
float input_value(size_t i) { return i % 13 == 5 ? 0.f : i % 13 == 7 ? -0.f : pattern_value(Pattern::poisoned, i); }

// channels_together: floats come and go as [N, H, W, C].
int64_t check(const Layer& l, bool unit, bool bits_in, bool bits_out, bool channels_together, bool thresholds) {
  BinaryCall c;
  c.batch = l.batch, c.channels = l.inputs, c.height = l.height, c.width = l.width, c.out_channels = l.outputs, c.groups = l.groups;
  c.out_height = size(l.height, l.kernel[0], l), c.out_width = size(l.width, l.kernel[1], l);
  for (int d = 0; d < 2; ++d) c.kernel[d] = l.kernel[d], c.stride[d] = l.stride, c.padding[d] = l.padding, c.dilation[d] = l.dilation;
  c.unit = unit, c.together = channels_together;
  const int64_t pixels = c.pixels(), plane = l.height * l.width, length = c.length(), out_rows = c.out_rows();

  const Buffer<uint32_t> codes(int64_t(l.outputs) * c.code_words(), 0), image(bits_in ? pixels * c.pixel_words() : 0, 0);
  const Buffer<float> x(bits_in ? 0 : pixels * l.inputs, 0), scales(l.outputs, 0), bias(l.outputs, 0), threshold(l.inputs, 0);
  const Buffer<int32_t> sums(int64_t(c.taps()) * l.outputs, 0), next_threshold(l.outputs, 0);
  const Buffer<uint8_t> flip(l.inputs, 0), next_flip(l.outputs, 0);
  std::memset(codes.data(), 0, codes.bytes()), std::memset(image.data(), 0, image.bytes()), std::memset(sums.data(), 0, sums.bytes());
  for (int n = 0; n < l.outputs; ++n) {
    for (int64_t k = 0; k < length; ++k) {
      const int w = sign(uint32_t(n * length + k));
      if (w < 0) set_bit(codes.data() + int64_t(n) * c.code_words(), k);
      sums.data()[k / c.inputs() * l.outputs + n] += w;
    }
    scales.data()[n] = pattern_value(Pattern::noise, n), bias.data()[n] = pattern_value(Pattern::noise, n + 1000);
    next_threshold.data()[n] = int(quantize::hash32(n) % 21) - 10, next_flip.data()[n] = n % 3 == 0;
  }
  for (int i = 0; i < l.inputs; ++i) threshold.data()[i] = 0.5f * pattern_value(Pattern::noise, i + 77), flip.data()[i] = i % 5 == 1;

  std::vector<int8_t> value(pixels * l.inputs);  // [pixel, channel]
  for (int64_t p = 0; p < pixels; ++p)
    for (int i = 0; i < l.inputs; ++i) {
      bool bit = sign(uint32_t(p * l.inputs + i) + 5000) < 0;
      if (bits_in) {
        if (bit) set_bit(image.data() + p * c.pixel_words(), i);
      } else {
        const int64_t at = channels_together ? p * l.inputs + i : (p / plane * l.inputs + i) * plane + p % plane;
        const float v = x.data()[at] = input_value(at);
        bit = v < (thresholds ? threshold.data()[i] : 0.f);
        if (thresholds && flip.data()[i]) bit = !bit;
      }
      value[p * l.inputs + i] = unit ? bit : bit ? -1 : 1;
    }

  std::vector<float> wanted(out_rows * l.outputs);
  const bool added = thresholds && !bits_out;
  const Buffer<float> residual(added ? wanted.size() : 0, 0);
  std::vector<uint32_t> bits(out_rows * c.out_words());
  for (int64_t row = 0; row < out_rows; ++row)
    for (int n = 0; n < l.outputs; ++n) {
      const int at = int(row % c.out_pixels()), sample = int(row / c.out_pixels()), group = n / c.outputs();
      int dot = 0;
      for (int tap = 0; tap < c.taps(); ++tap) {
        const int h = at / c.out_width * l.stride - l.padding + tap / l.kernel[1] * l.dilation;
        const int w = at % c.out_width * l.stride - l.padding + tap % l.kernel[1] * l.dilation;
        if (h < 0 || h >= l.height || w < 0 || w >= l.width) continue;
        const int8_t* pixel = &value[(sample * plane + h * l.width + w) * l.inputs + group * c.inputs()];
        for (int i = 0; i < c.inputs(); ++i) dot += pixel[i] * sign(uint32_t(n * length + tap * c.inputs() + i));
      }
      const int64_t place = channels_together ? row * l.outputs + n : (int64_t(sample) * l.outputs + n) * c.out_pixels() + at;
      const float product = float(dot) * scales.data()[n];
      wanted[place] = product + (thresholds ? bias.data()[n] : 0.f);
      if (added) wanted[place] += residual.data()[place] = pattern_value(Pattern::noise, place + 3000);
      if ((dot < next_threshold.data()[n]) != (thresholds && next_flip.data()[n])) set_bit(&bits[row * c.out_words()], n);
    }

  c.codes = codes.data(), c.sums = sums.data(), c.scales = scales.data();
  if (bits_in)
    c.image = image.data();
  else
    c.floats = x.data();
  if (thresholds) c.bias = bias.data(), c.next_flip = next_flip.data();
  if (thresholds && !bits_in) c.threshold = threshold.data(), c.flip = flip.data();
  if (bits_out) c.next_threshold = next_threshold.data();
  if (added) c.residual = residual.data();
  int64_t count = 0;
  for (const BinaryPath path : {BinaryPath::rows, BinaryPath::small_tiles, BinaryPath::wide_tiles, BinaryPath::direct}) {
    if (!takes(c, path)) continue;
    const Buffer<float> out(bits_out ? 0 : wanted.size(), 0);
    const Buffer<uint32_t> out_bits(bits_out ? bits.size() : 0, 0);
    (bits_out ? void(c.out_bits = out_bits.data()) : void(c.out = out.data()));
    simt::Launcher launch(1);
    launch_binary(c, path, launch);
    const std::string what = std::to_string(l.inputs) + " to " + std::to_string(l.outputs) + " channels, kernel " +
                             std::to_string(l.kernel[0]) + ", path " + std::to_string(int(path)) + (unit ? ", unit" : "");
    bits_out ? expect_same(out_bits.data(), bits, what) : expect_same(out.data(), wanted, what);
    ++count;
  }
  return count;
}

// A grid may have fewer rows than a pixel has words: blocks take what is left in turns.
int64_t check_few_grid_rows() {
  BinaryCall c;
  c.batch = 2, c.channels = 290, c.height = 3, c.width = 5, c.out_channels = 1;
  const int pixels = int(c.pixels()), words = c.pixel_words();
  const Buffer<float> x(size_t(pixels) * c.channels, 0);
  for (int i = 0; i < pixels * c.channels; ++i) x.data()[i] = input_value(i);
  c.floats = x.data();
  simt::Launcher launch(1);
  std::vector<uint32_t> want(size_t(pixels) * words, 1), got(want.size(), 2);
  for (const auto& [image, rows] : {std::pair{&want, words}, std::pair{&got, 3}})
    launch(pack_binary_planes, dim3(1, unsigned(rows)), DeviceBinary::threads, c, quantize::Divider(c.height * c.width), pixels,
           image->data());
  expect_same(got.data(), want, "binary: planes packed by few blocks");
  return 1;
}

// Sizes at which the kernels' counters end, without the memory that goes with them.
int64_t check_countable() {
  float out;
  uint32_t out_bits;
  BinaryCall c;
  const auto expect = [&](bool countable, const char* what) {
    if (is_countable(c) != countable) fail(std::string("binary: countable, ") + what);
  };
  c.batch = 1, c.channels = 1, c.height = c.width = 1, c.out_channels = 33, c.together = true, c.out = &out;
  c.out_height = (1 << 14) - 1, c.out_width = 1 << 15;  // two words a pixel: just below 2^30
  expect(true, "floats");
  c.out_height = 1 << 14;
  expect(false, "words of floats");
  c.out_channels = 32, c.out = nullptr, c.out_bits = &out_bits;
  expect(false, "words of bits, which come in twos");
  c.out_height = (1 << 14) - 1;
  expect(true, "bits");
  c.together = false, c.out_bits = nullptr, c.out = &out, c.out_channels = 40, c.out_height = 1 << 14;
  expect(true, "pixels of a channel");
  c.out_channels = 64;
  expect(false, "32s of all channels' pixels");
  c.out_channels = 1, c.out_height = c.out_width = 1 << 16;
  expect(false, "pixels that 32 bits cannot count");
  return 7;
}

}  // namespace

int64_t check_binary() {
  int64_t count = check_few_grid_rows() + check_countable(), number = 0;
  for (const Layer& layer : kLayers)
    for (const bool unit : {false, true})
      for (const bool bits_out : {false, true}) {
        // The rest takes turns: it meets every layer and both kinds, not each of their pairs.
        const int64_t turn = number + number / 4;
        ++number;
        count += check(layer, unit, turn % 3 == 2, bits_out, turn % 2 == 0, turn / 2 % 2 == 0);
        if (!bits_out) count += check(layer, unit, turn % 3 == 0, bits_out, turn % 2 == 1, turn / 2 % 2 == 1);
      }
  // Long enough for warps and threads to loop.
  count += check({1, 1, 1, {3, 3}, 1, 1, 1, 1, 95, 90}, false, false, false, false, true);
  count += check({1, 1, 1, {1, 1}, 1, 0, 1, 1, 1, 1100}, true, false, false, true, true);
  return count;
}

}  // namespace cuda_on_host
