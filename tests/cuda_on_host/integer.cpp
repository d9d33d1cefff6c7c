// Integer layers: every path that takes a layer, bit for bit what a loop over the weights gives. Rows of floats: within their rounding.
#include "packed/float_rows.cuh"
#include "packed/integer_launch.cuh"

#include "harness.h"
#include "layers.h"

namespace cuda_on_host {
namespace {

using namespace quantize::packed;

void set_code(uint8_t* row, int64_t k, int bits, uint32_t code) { row[k * bits / 8] |= uint8_t(code << (k * bits % 8)); }

// Powers of two at 2 and 4 bits, whose last code is as far from zero as any; minus zero does not occur.
std::vector<float> table(int bits) {
  const int half = 1 << (bits - 1);
  std::vector<float> levels(2 * half);
  for (int code = 0; code < 2 * half; ++code) {
    const int exponent = code % half - 1;
    const float level = exponent < 0 ? 0.f : std::ldexp(1.f, exponent);
    levels[code] = bits == 8 ? float(int8_t(code)) : code == half ? std::numeric_limits<float>::quiet_NaN() : code > half ? -level : level;
  }
  if (bits == 8) levels[128] = std::numeric_limits<float>::quiet_NaN();
  return levels;
}

// extra: a bias, a residual, clipping.
int64_t check(const Layer& l, int bits, int activation_bits, bool channels_together, bool extra, float step) {
  IntegerCall c;
  c.batch = l.batch, c.channels = l.inputs, c.height = l.height, c.width = l.width, c.out_channels = l.outputs, c.groups = l.groups;
  c.out_height = size(l.height, l.kernel[0], l), c.out_width = size(l.width, l.kernel[1], l);
  for (int d = 0; d < 2; ++d) c.kernel[d] = l.kernel[d], c.stride[d] = l.stride, c.padding[d] = l.padding, c.dilation[d] = l.dilation;
  c.together = channels_together, c.bits = bits, c.most_code = (1 << activation_bits) - 1;
  const int64_t plane = l.height * l.width, pixels = l.batch * plane, length = int64_t(c.taps()) * c.inputs(), out_rows = c.out_rows();
  const int zero = extra ? c.most_code / 3 : 0;

  const std::vector<float> known = table(bits);
  const Buffer<uint8_t> codes(l.outputs * c.code_bytes(), 0);
  const Buffer<float> x(pixels * l.inputs, 0), scales(l.outputs, 0), bias(l.outputs, 0), levels(known.size(), 0), grid(2, 0);
  const Buffer<int32_t> sums(l.outputs, 0);
  std::copy(known.begin(), known.end(), levels.data());
  grid.data()[0] = step, grid.data()[1] = float(zero);
  std::memset(codes.data(), 0, codes.bytes()), std::memset(sums.data(), 0, sums.bytes());
  std::vector<int> weight(l.outputs * length);
  for (int n = 0; n < l.outputs; ++n) {
    for (int64_t k = 0; k < length; ++k) {
      uint32_t code = quantize::hash32(uint32_t(n * length + k)) % uint32_t(known.size());
      if (std::isnan(known[code])) code = 1;
      set_code(codes.data() + n * c.code_bytes(), k, bits, code);
      sums.data()[n] += weight[n * length + k] = int(known[code]);
    }
    scales.data()[n] = pattern_value(Pattern::noise, n), bias.data()[n] = pattern_value(Pattern::noise, n + 1000);
  }
  std::vector<int> value(pixels * l.inputs);  // [pixel, channel], less the zero point
  const auto range = quantize::weight::lsq_range(step, float(zero), c.most_code);
  for (int64_t p = 0; p < pixels; ++p)
    for (int i = 0; i < l.inputs; ++i) {
      const int64_t at = channels_together ? p * l.inputs + i : (p / plane * l.inputs + i) * plane + p % plane;
      const float v = x.data()[at] = pattern_value(Pattern::poisoned, at);
      const float rounded = quantize::weight::lsq_clip(quantize::weight::lsq_round(quantize::weight::lsq_divide(v, range)), range);
      value[p * l.inputs + i] = std::isnan(v) ? -zero : int(rounded);
    }

  std::vector<float> wanted(out_rows * l.outputs);
  const Buffer<float> residual(extra ? wanted.size() : 0, 0);
  c.low = extra ? -0.5f : -std::numeric_limits<float>::infinity(), c.high = extra ? 6.f : std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < out_rows; ++row)
    for (int n = 0; n < l.outputs; ++n) {
      const int at = int(row % c.out_pixels()), sample = int(row / c.out_pixels()), group = n / c.outputs();
      int dot = 0;
      for (int tap = 0; tap < c.taps(); ++tap) {
        const int h = at / c.out_width * l.stride - l.padding + tap / l.kernel[1] * l.dilation;
        const int w = at % c.out_width * l.stride - l.padding + tap % l.kernel[1] * l.dilation;
        if (h < 0 || h >= l.height || w < 0 || w >= l.width) continue;
        const int* pixel = &value[(sample * plane + h * l.width + w) * l.inputs + group * c.inputs()];
        for (int i = 0; i < c.inputs(); ++i) dot += pixel[i] * weight[n * length + tap * c.inputs() + i];
      }
      const int64_t place = channels_together ? row * l.outputs + n : (int64_t(sample) * l.outputs + n) * c.out_pixels() + at;
      const float gain = range.step * scales.data()[n], product = float(dot) * gain;
      wanted[place] = product + (extra ? bias.data()[n] : 0.f);
      if (extra) wanted[place] += residual.data()[place] = pattern_value(Pattern::noise, place + 3000);
      wanted[place] = std::min(std::max(wanted[place], c.low), c.high);
    }

  c.codes = codes.data(), c.levels = levels.data(), c.sums = sums.data(), c.scales = scales.data(), c.floats = x.data();
  c.step = grid.data(), c.zero_point = grid.data() + 1;
  if (extra) c.bias = bias.data(), c.residual = residual.data();
  int64_t count = 0;
  for (const IntegerPath path : {IntegerPath::rows, IntegerPath::small_tiles, IntegerPath::wide_tiles}) {
    if (!takes(c, path)) continue;
    const Buffer<float> out(wanted.size(), 0);
    c.out = out.data();
    simt::Launcher launch(1);
    launch_integer(c, path, launch);
    expect_same(out.data(), wanted,
                std::to_string(bits) + " bits, " + std::to_string(l.inputs) + " to " + std::to_string(l.outputs) + " channels, kernel " +
                    std::to_string(l.kernel[0]) + ", path " + std::to_string(int(path)));
    ++count;
  }
  return count;
}

// Sums of floats whose products are exact: a row of small whole numbers.
int64_t check_floats(int rows, int columns, int out_channels, int bits, int offset) {
  const std::vector<float> known = table(bits);
  const int64_t code_bytes = (int64_t(columns) * bits + 63) / 64 * 8;
  const Buffer<uint8_t> codes(out_channels * code_bytes, 0);
  const Buffer<float> x(size_t(rows) * columns, offset), levels(known.size(), 0), scales(out_channels, 0), bias(out_channels, 0);
  std::copy(known.begin(), known.end(), levels.data());
  std::memset(codes.data(), 0, codes.bytes());
  for (int i = 0; i < rows * columns; ++i) x.data()[i] = float(int(quantize::hash32(uint32_t(i)) % 17) - 8);
  std::vector<float> wanted(size_t(rows) * out_channels);
  for (int n = 0; n < out_channels; ++n) {
    scales.data()[n] = pattern_value(Pattern::noise, n), bias.data()[n] = pattern_value(Pattern::noise, n + 1000);
    std::vector<int> sums(rows);
    for (int k = 0; k < columns; ++k) {
      uint32_t code = quantize::hash32(uint32_t(n * columns + k + 99)) % uint32_t(known.size());
      if (std::isnan(known[code])) code = 1;
      set_code(codes.data() + n * code_bytes, k, bits, code);
      for (int r = 0; r < rows; ++r) sums[r] += int(x.data()[r * columns + k]) * int(known[code]);
    }
    for (int r = 0; r < rows; ++r) {
      const float product = float(sums[r]) * scales.data()[n];
      wanted[r * out_channels + n] = product + (n % 2 ? 0.f : bias.data()[n]);
    }
    if (n % 2) bias.data()[n] = 0.f;
  }
  const Buffer<float> out(wanted.size(), 0);
  FloatRowsCall c{x.data(), rows, columns, out_channels, 0, codes.data(), levels.data(), scales.data(), bias.data(), out.data()};
  simt::Launcher launch(1);
  launch_float_rows(c, bits, code_bytes, launch);
  expect_same(out.data(), wanted, "rows of floats, " + std::to_string(bits) + " bits, " + std::to_string(columns) + " columns");
  return 1;
}

// A grid may have fewer rows than a pixel has words: blocks take what is left in turns.
int64_t check_few_grid_rows() {
  IntegerCall c;
  c.batch = 2, c.channels = 45, c.height = 3, c.width = 5, c.out_channels = 1, c.most_code = 255;
  const int pixels = int(c.pixels()), words = c.pixel_words();
  const Buffer<float> x(size_t(pixels) * c.channels, 0), grid(2, 0);
  for (int i = 0; i < pixels * c.channels; ++i) x.data()[i] = pattern_value(Pattern::noise, i);
  grid.data()[0] = 0.01f, grid.data()[1] = 100.f;
  c.floats = x.data(), c.step = grid.data(), c.zero_point = grid.data() + 1;
  const ImageDividers by{quantize::Divider(15), quantize::Divider(5), quantize::Divider(words), quantize::Divider(words)};
  simt::Launcher launch(1);
  std::vector<uint32_t> want(size_t(pixels) * words, 1), got(want.size(), 2);
  for (const auto& [image, rows] : {std::pair{&want, words}, std::pair{&got, 2}})
    launch(pack_integer_planes, dim3(1, unsigned(rows)), DeviceInteger::threads, c, by, pixels, image->data());
  expect_same(got.data(), want, "integer: planes packed by few blocks");
  return 1;
}

// Sizes at which the kernels' counters end, without the memory that goes with them.
int64_t check_countable() {
  IntegerCall c;
  const auto expect = [&](bool countable, const char* what) {
    if (is_countable(c) != countable) fail(std::string("integer: countable, ") + what);
  };
  c.batch = 1, c.channels = 5, c.out_channels = 1, c.out_height = 1, c.out_width = 1;
  c.height = (1 << 14) - 1, c.width = 1 << 15;  // two words a pixel: just below 2^30
  expect(true, "words");
  c.height = 1 << 14;
  expect(false, "words that 30 bits cannot count");
  c.height = (1 << 14) - 2, c.padding[0] = 1;
  expect(false, "padding among them");
  c.padding[0] = 0, c.batch = 2;
  expect(false, "all samples");
  c.batch = 1, c.height = c.width = 1, c.out_height = c.out_width = 1 << 15;
  expect(false, "pixels of the output");
  c.out_height = c.out_width = 1, c.channels = 1 << 20, c.out_channels = 1 << 12;
  expect(false, "words of weights");
  return 6;
}

}  // namespace

int64_t check_integer() {
  int64_t count = check_few_grid_rows() + check_countable(), number = 0;
  for (const Layer& layer : kLayers)
    for (const int bits : {2, 4, 8}) {
      // The rest takes turns: it meets every layer and all bits, not each of their pairs.
      const int64_t turn = number + number / 3;
      ++number;
      count += check(layer, bits, 8, turn % 2 == 0, turn / 2 % 2 == 0, 0.013f);
      if (turn % 3 == 0) count += check(layer, bits, 3, turn % 2 == 1, turn / 2 % 2 == 1, turn % 6 == 0 ? 0.2f : -1.f);
    }
  for (const int bits : {2, 4, 8})
    for (const int rows : {1, 2, 3, 8})
      for (const int columns : {1, 5, 64, 250, 2048, 2052}) count += check_floats(rows, columns, 35, bits, columns % 3);
  // Long enough for threads to loop.
  count += check({1, 1, 1, {3, 3}, 1, 1, 1, 1, 95, 90}, 4, 8, false, true, 0.01f);
  count += check({1, 1, 1, {3, 3}, 1, 1, 1, 1, 95, 90}, 4, 8, true, true, 0.01f);
  count += check({2, 9000, 2, {1, 1}, 1, 0, 1, 1, 1, 1}, 2, 8, true, true, 0.01f);
  return count;
}

}  // namespace cuda_on_host
