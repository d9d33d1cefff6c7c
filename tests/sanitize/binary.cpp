// Binary layers: every ISA's kernels are the portable ones, bit for bit.
#include "packed/binary_kernels.h"

#include <algorithm>

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

constexpr int64_t row = BinaryTraits::stride;

// Runs `kernel` on this ISA and on the portable one, and compares what it writes.
template <typename T, typename Kernel>
int64_t compare(Isa isa, Fence fence, size_t count, const std::string& what, Kernel kernel) {
  const Buffer<T> got(count, fence), want(count, fence);
  quantize::set_cpu_isa(isa);
  kernel(binary_kernels(), got);
  quantize::set_cpu_isa(Isa::portable);
  kernel(binary_kernels(), want);
  expect_same(got, want, "binary: " + what);
  return 1;
}

int64_t check_packing(Isa isa, Fence fence, int channels, int64_t pixels) {
  const Buffer<F32> x(channels * pixels, fence);
  const Noise<float> threshold(channels, fence, 1);
  const std::string what = std::to_string(channels) + " channels, " + std::to_string(pixels) + " pixels";
  int64_t count = 0;
  for (Pattern pattern : kPatterns) {
    fill(x, pattern);
    const auto* floats = reinterpret_cast<const float*>(x.data());
    for (const float* t : {static_cast<const float*>(nullptr), static_cast<const float*>(threshold.data())}) {
      count += compare<uint64_t>(isa, fence, pixels, "planes of " + what, [&](const BinaryKernels& k, const Buffer<uint64_t>& words) {
        k.pack_planes(floats, pixels, channels, t, 0x5a5a, words.data());
      });
      count += compare<uint64_t>(isa, fence, pixels, "rows of " + what, [&](const BinaryKernels& k, const Buffer<uint64_t>& words) {
        k.pack_rows(floats, channels, pixels, channels, t, 0x5a5a, words.data());
      });
    }
  }
  return count;
}

// Only the block's own pixels: vectors write behind them.
int64_t check_gather(Isa isa, Fence fence, int64_t channels, int64_t step, int64_t first, int64_t pixels) {
  const BinaryWindow window{{3, 2}, {step, step}, {1, 2}, channels, 3 * step + 14, (3 * step + 14) * (4 * step + 6), 15 / step};
  const int64_t planes = (channels + 63) / 64, words = (6 * channels + 63) / 64;
  const Noise<uint64_t> image(planes * window.plane + BinaryTraits::slack, fence, 3);
  const std::string what = "gather of " + std::to_string(channels) + " channels, stride " + std::to_string(step);
  return compare<uint64_t>(isa, fence, words * pixels, what, [&](const BinaryKernels& k, const Buffer<uint64_t>& out) {
    const Buffer<uint64_t> x(words * row, fence);
    k.gather(image.data(), window, first, pixels, x.data());
    for (int64_t w = 0; w < words; ++w) std::copy_n(x.data() + w * row, pixels, out.data() + w * pixels);
  });
}

int64_t check_products(Isa isa, Fence fence, int64_t words, int64_t pixels, int channels) {
  const Noise<uint64_t> x(words * row, fence, 4);
  const Noise<uint8_t> codes(channels * words * 8, fence, 6);
  constexpr int taps = 3;
  const Buffer<int32_t> outside(taps * row, fence), ones(taps * BinaryTraits::channels, fence);
  for (int64_t i = 0; i < taps * row; ++i) outside[i] = quantize::hash32(uint32_t(i)) % 3 ? -1 : 0;
  for (int i = 0; i < taps * BinaryTraits::channels; ++i) ones[i] = i * 7;
  const std::string what =
      std::to_string(words) + " words, " + std::to_string(pixels) + " pixels, " + std::to_string(channels) + " channels";
  int64_t count = 0;
  for (int some : {0, taps})
    count += compare<int32_t>(isa, fence, channels * pixels, "words, " + what, [&](const BinaryKernels& k, const Buffer<int32_t>& out) {
      const Buffer<int32_t> counts(channels * row, fence);
      k.multiply(x.data(), words, pixels, codes.data(), channels, counts.data());
      k.leave_out(counts.data(), channels, pixels, some, outside.data(), ones.data());
      for (int c = 0; c < channels; ++c) std::copy_n(counts.data() + c * row, pixels, out.data() + c * pixels);
    });
  count += compare<int32_t>(isa, fence, channels, "row, " + what, [&](const BinaryKernels& k, const Buffer<int32_t>& out) {
    k.multiply_row(x.data(), words, codes.data(), channels, out.data());
  });
  return count;
}

// Lookups against words: of one tap, from the words of an image of one line.
int64_t check_lookup(Isa isa, Fence fence, int64_t channels, int64_t step, int64_t pixels, int outputs) {
  const int64_t width = (pixels - 1) * step + 1, planes = (channels + 63) / 64, quads = (channels + 3) / 4, panels = (outputs + 3) / 4;
  const BinaryWindow window{{1, 1}, {1, step}, {1, 1}, channels, width, width, pixels};
  const Noise<uint64_t> image(planes * width + BinaryTraits::slack, fence, 7);
  const Noise<uint8_t> codes(outputs * planes * 8, fence, 8);
  const auto keep = [&](int64_t k) { return channels - 64 * k < 64 ? (uint64_t(1) << (channels - 64 * k)) - 1 : ~uint64_t(0); };
  for (int64_t i = 0; i < planes * width; ++i) image[i] &= keep(i / width);
  const Buffer<uint8_t> nibbles(panels * quads * 4, fence);
  for (int64_t c = 0; c < 4 * panels; ++c)
    for (int64_t q = 0; q < quads; ++q) {
      uint64_t word = 0;
      if (c < outputs) std::memcpy(&word, &codes[c * planes * 8 + q / 16 * 8], 8);
      nibbles[(c / 4 * quads + q) * 4 + c % 4] = uint8_t((word & keep(q / 16)) >> (4 * (q % 16)) << 4);
    }
  for (int c = 0; c < outputs; ++c) {
    uint64_t word;
    std::memcpy(&word, &codes[(c + 1) * planes * 8 - 8], 8);
    word &= keep(planes - 1);
    std::memcpy(&codes[(c + 1) * planes * 8 - 8], &word, 8);
  }
  const std::string what =
      std::to_string(channels) + " channels, stride " + std::to_string(step) + ", " + std::to_string(pixels) + " pixels";
  return compare<int32_t>(isa, fence, outputs * pixels, "lookup, " + what, [&](const BinaryKernels& k, const Buffer<int32_t>& out) {
    const Buffer<int32_t> counts(4 * panels * row, fence);
    if (k.lookup) {
      const int64_t plane = (width + 31) / 32 * 32;
      BinaryWindow own = window;
      own.plane = plane;
      const Buffer<uint8_t> bytes(planes * 16 * plane + BinaryTraits::slack, fence),
          index(quads * BinaryTraits::block + BinaryTraits::slack, fence);
      const Buffer<uint64_t> words(plane, fence);
      for (int64_t p = 0; p < planes; ++p) {
        std::copy_n(&image[p * width], width, words.data());
        k.index(words.data(), width, int(std::min<int64_t>(16, quads - 16 * p)), bytes.data() + p * 16 * plane, plane);
      }
      k.gather_index(bytes.data(), own, 0, pixels, index.data(), BinaryTraits::block);
      k.lookup(index.data(), BinaryTraits::block, quads, pixels, nibbles.data(), int(panels), counts.data());
    } else {
      const Buffer<uint64_t> x(planes * row, fence);
      k.gather(image.data(), window, 0, pixels, x.data());
      k.multiply(x.data(), planes, pixels, codes.data(), outputs, counts.data());
    }
    for (int c = 0; c < outputs; ++c) std::copy_n(counts.data() + c * row, pixels, out.data() + c * pixels);
  });
}

// Levels of two bits, against the arithmetic of lsq.h.
int64_t check_levels(Isa isa, Fence fence, int channels, int64_t pixels, Pattern pattern) {
  quantize::set_cpu_isa(isa);
  const BinaryKernels& k = binary_kernels();
  if (!k.lookup) return 0;
  const Buffer<F32> x(channels * pixels, fence);
  fill(x, pattern);
  const auto* values = reinterpret_cast<const float*>(x.data());
  const auto range = quantize::weight::lsq_range(1.f / 3, 0.f, 3);
  for (bool rows : {false, true}) {
    const Buffer<uint64_t> low(pixels, fence), high(pixels, fence), want_low(pixels, fence), want_high(pixels, fence);
    if (rows)
      k.pack_level_rows(values, channels, pixels, channels, range, low.data(), high.data());
    else
      k.pack_level_planes(values, pixels, channels, range, low.data(), high.data());
    for (int64_t p = 0; p < pixels; ++p) {
      want_low[p] = want_high[p] = 0;
      for (int c = 0; c < channels; ++c) {
        const float value = values[rows ? p * channels + c : c * pixels + p];
        const float rounded = quantize::weight::lsq_round(quantize::weight::lsq_divide(value, range));
        const auto code = value == value ? uint64_t(quantize::weight::lsq_clip(rounded, range)) : 0;  // NaN: the lower end
        want_low[p] |= (code & 1) << c, want_high[p] |= (code >> 1) << c;
      }
    }
    const std::string what = "levels: " + std::to_string(channels) + " channels, " + std::to_string(pixels) + " pixels";
    expect_same(low, want_low, what), expect_same(high, want_high, what);
  }
  return 2;
}

int64_t check_finishing(Isa isa, Fence fence, int64_t pixels, int channels) {
  const Buffer<int32_t> counts(channels * row, fence), base(pixels, fence), shift(channels, fence), limit(channels, fence);
  const Buffer<float> scale(channels, fence), bias(channels, fence);
  const Noise<float> residual(channels * pixels, fence, 9);
  for (int64_t i = 0; i < channels * row; ++i) counts[i] = int32_t(quantize::hash32(uint32_t(i)) >> 20);
  for (int64_t i = 0; i < pixels; ++i) base[i] = int32_t(3000 + i);
  for (int c = 0; c < channels; ++c) shift[c] = -c, limit[c] = 40 * c - 300, scale[c] = 0.37f * float(c - 3), bias[c] = 1.3f * float(c);
  const std::string what = std::to_string(pixels) + " pixels, " + std::to_string(channels) + " channels";
  int64_t count = 0;
  for (bool unit : {false, true}) {
    const BinaryFinish finish{unit, base.data(), shift.data()};
    for (bool rows : {false, true})
      for (const float* more : {static_cast<const float*>(nullptr), static_cast<const float*>(residual.data())})
        count += compare<float>(isa, fence, channels * pixels, "floats, " + what, [&](const BinaryKernels& k, const Buffer<float>& out) {
          k.finish_floats(counts.data(), channels, pixels, finish, scale.data(), bias.data(), out.data(), more, rows ? 1 : pixels,
                          rows ? channels : 1);
        });
    count += compare<uint16_t>(isa, fence, pixels, "bits, " + what, [&](const BinaryKernels& k, const Buffer<uint16_t>& bits) {
      k.finish_bits(counts.data(), channels, pixels, finish, limit.data(), bits.data());
    });
  }
  return count;
}

}  // namespace

int64_t check_binary(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int channels : {1, 16, 31, 33, 64})
    for (int64_t pixels : {1, 15, 32, 129}) {
      count += check_packing(isa, fence, channels, pixels);
      for (Pattern pattern : kPatterns) count += check_levels(isa, fence, channels, pixels, pattern);
    }
  for (int64_t channels : {1, 16, 63, 64, 96})
    for (int64_t step : {1, 2})
      for (int64_t pixels : {1, 9, 21}) count += check_gather(isa, fence, channels, step, 3, pixels);
  for (int64_t words : {1, 3, 8, 9, 36, 260})
    for (int64_t pixels : {1, 5, 33, 128})
      for (int channels : {1, 3, 4, 16}) count += check_products(isa, fence, words, pixels, channels);
  for (int64_t channels : {1, 4, 30, 64, 65, 260, 16500})
    for (int64_t step : {1, 2, 3})
      for (int64_t pixels : {1, 33, 65, 128})
        for (int outputs : {1, 9}) count += check_lookup(isa, fence, channels, step, pixels, outputs);
  for (int64_t pixels : {1, 7, 64, 128})
    for (int channels : {1, 9, 16}) count += check_finishing(isa, fence, pixels, channels);
  return count;
}

}  // namespace sanitize
