// Binary layers: every ISA's kernels are the portable ones, bit for bit.
#include "packed/binary_kernels.h"

#include <algorithm>

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

constexpr int64_t row = BinaryTraits::stride;

template <typename T>
struct Noise : Buffer<T> {
  Noise(size_t count, Fence fence, uint32_t salt) : Buffer<T>(count, fence) {
    auto* bytes = reinterpret_cast<uint8_t*>(this->data());
    for (size_t i = 0; i < count * sizeof(T); ++i) bytes[i] = uint8_t(quantize::hash32(uint32_t(i) + salt) >> 8);
  }
};

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

int64_t check_packing(Isa isa, Fence fence, int64_t channels, int64_t pixels) {
  const int64_t planes = (channels + 63) / 64;
  const Buffer<F32> x(channels * pixels, fence);
  const Noise<float> threshold(channels, fence, 1);
  const Noise<uint64_t> flips(planes, fence, 2);
  const std::string what = std::to_string(channels) + " channels, " + std::to_string(pixels) + " pixels";
  int64_t count = 0;
  for (Pattern pattern : kPatterns) {
    fill(x, pattern);
    const auto* floats = reinterpret_cast<const float*>(x.data());
    for (const float* t : {static_cast<const float*>(nullptr), static_cast<const float*>(threshold.data())}) {
      count += compare<uint64_t>(isa, fence, planes * pixels, "planes of " + what, [&](const BinaryKernels& k, const Buffer<uint64_t>& words) {
        k.pack_planes(floats, pixels, channels, t, flips.data(), words.data());
      });
      count += compare<uint64_t>(isa, fence, planes * pixels, "rows of " + what, [&](const BinaryKernels& k, const Buffer<uint64_t>& words) {
        k.pack_rows(floats, channels, channels, pixels, t, flips.data(), words.data(), pixels);
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
    k.gather(image.data(), planes == 1 ? 0 : window.plane, window, first, pixels, x.data());
    for (int64_t w = 0; w < words; ++w) std::copy_n(x.data() + w * row, pixels, out.data() + w * pixels);
  });
}

int64_t check_products(Isa isa, Fence fence, int64_t words, int64_t pixels, int channels) {
  const Noise<uint64_t> x(words * row, fence, 4), mask(words * row, fence, 5);
  const Noise<uint8_t> codes(channels * words * 8, fence, 6);
  const std::string what = std::to_string(words) + " words, " + std::to_string(pixels) + " pixels, " + std::to_string(channels) + " channels";
  const auto own = [&](const Buffer<int32_t>& counts, const Buffer<int32_t>& out) {
    for (int c = 0; c < channels; ++c) std::copy_n(counts.data() + c * row, pixels, out.data() + c * pixels);
  };
  int64_t count = 0;
  for (const uint64_t* m : {static_cast<const uint64_t*>(nullptr), static_cast<const uint64_t*>(mask.data())})
    count += compare<int32_t>(isa, fence, channels * pixels, "words, " + what, [&](const BinaryKernels& k, const Buffer<int32_t>& out) {
      const Buffer<int32_t> counts(channels * row, fence);
      k.multiply(x.data(), m, words, pixels, codes.data(), channels, counts.data());
      own(counts, out);
    });
  count += compare<int32_t>(isa, fence, channels, "row, " + what, [&](const BinaryKernels& k, const Buffer<int32_t>& out) {
    k.multiply_row(x.data(), words, codes.data(), channels, out.data());
  });
  // The lookup against the words: panels of the codes' nibbles.
  const int panels = (channels + 3) / 4;
  const int64_t quads = words * 16 - 5;
  const Buffer<uint8_t> nibbles(panels * quads * 4, fence), clean(channels * words * 8, fence);
  const Buffer<uint64_t> inputs(words * row, fence);
  std::copy_n(codes.data(), channels * words * 8, clean.data());
  std::copy_n(x.data(), words * row, inputs.data());
  for (int64_t i = 0; i < row; ++i) inputs[(words - 1) * row + i] &= ~uint64_t(0) >> 20;
  for (int c = 0; c < channels; ++c) {
    uint8_t* end = clean.data() + (c + 1) * words * 8;
    end[-1] = end[-2] = 0, end[-3] &= 15;
  }
  for (int c = 0; c < 4 * panels; ++c)
    for (int64_t q = 0; q < quads; ++q)
      nibbles[(c / 4 * quads + q) * 4 + c % 4] = c < channels ? uint8_t(clean[c * words * 8 + q / 2] >> (4 * (q % 2)) << 4) : uint8_t(0);
  count += compare<int32_t>(isa, fence, channels * pixels, "lookup, " + what, [&](const BinaryKernels& k, const Buffer<int32_t>& out) {
    const Buffer<int32_t> counts(4 * panels * row, fence);
    if (k.lookup) {
      const Buffer<uint8_t> index(16 * words * row, fence);
      k.index(inputs.data(), words, pixels, index.data());
      k.lookup(index.data(), quads, pixels, nibbles.data(), panels, counts.data());
    } else {
      k.multiply(inputs.data(), nullptr, words, pixels, clean.data(), channels, counts.data());
    }
    own(counts, out);
  });
  return count;
}

int64_t check_finishing(Isa isa, Fence fence, int64_t pixels, int channels) {
  const Buffer<int32_t> counts(channels * row, fence), base(pixels, fence), shift(channels, fence), limit(channels, fence);
  const Buffer<float> scale(channels, fence), bias(channels, fence);
  for (int64_t i = 0; i < channels * row; ++i) counts[i] = int32_t(quantize::hash32(uint32_t(i)) >> 20);
  for (int64_t i = 0; i < pixels; ++i) base[i] = int32_t(3000 + i);
  for (int c = 0; c < channels; ++c) shift[c] = -c, limit[c] = 40 * c - 300, scale[c] = 0.37f * float(c - 3), bias[c] = 1.3f * float(c);
  const std::string what = std::to_string(pixels) + " pixels, " + std::to_string(channels) + " channels";
  const BinaryFinish finish{-2, base.data(), shift.data()};
  int64_t count = 0;
  for (const auto& [channel, pixel] : {std::pair<int64_t, int64_t>{pixels, 1}, {1, channels}})
    count += compare<float>(isa, fence, channels * pixels, "floats, " + what, [&, channel = channel, pixel = pixel](const BinaryKernels& k,
                                                                                                             const Buffer<float>& out) {
      k.finish_floats(counts.data(), channels, pixels, finish, scale.data(), bias.data(), out.data(), channel, pixel);
    });
  return count + compare<uint16_t>(isa, fence, pixels, "bits, " + what, [&](const BinaryKernels& k, const Buffer<uint16_t>& bits) {
           k.finish_bits(counts.data(), channels, pixels, finish, limit.data(), bits.data());
         });
}

}  // namespace

int64_t check_binary(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int64_t channels : {1, 16, 31, 64, 65, 130})
    for (int64_t pixels : {1, 15, 16, 49}) count += check_packing(isa, fence, channels, pixels);
  for (int64_t channels : {1, 16, 63, 64, 96})
    for (int64_t step : {1, 2})
      for (int64_t pixels : {1, 9, 21}) count += check_gather(isa, fence, channels, step, 3, pixels);
  for (int64_t words : {1, 3, 8, 9, 36, 260})
    for (int64_t pixels : {1, 5, 33, 128})
      for (int channels : {1, 3, 4, 16}) count += check_products(isa, fence, words, pixels, channels);
  for (int64_t pixels : {1, 7, 64, 128})
    for (int channels : {1, 9, 16}) count += check_finishing(isa, fence, pixels, channels);
  return count;
}

}  // namespace sanitize
