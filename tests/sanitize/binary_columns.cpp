// Binary layers by columns: against sums bit by bit.
#include "packed/binary_columns.h"

#include <bit>

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

constexpr int64_t columns = ColumnTraits::columns;

int64_t check_products(const BinaryColumnKernels& kernels, Fence fence, int64_t pixels, int64_t lines, int64_t length, int channels) {
  const int64_t words = lines * length, step = 3, kinds = 2;
  const bool unit = pixels % 2 == 0;
  const std::string what = "columns: " + std::to_string(pixels) + " pixels, " + std::to_string(lines) + " by " + std::to_string(length) +
                           " words, " + std::to_string(channels) + " channels";
  const Noise<uint8_t> codes(channels * words * 4, fence, 1);
  const Buffer<uint32_t> turned(words * columns, fence), want_turned(words * columns, fence);
  kernels.turn(codes.data(), words, channels, turned.data());
  for (int64_t k = 0; k < words; ++k)
    for (int64_t c = 0; c < columns; ++c) {
      want_turned[k * columns + c] = 0;
      if (c < channels) std::memcpy(want_turned.data() + k * columns + c, codes.data() + (c * words + k) * 4, 4);
    }
  expect_same(turned, want_turned, what + ", turned");
  const Noise<uint32_t> image((pixels - 1) * step + (lines - 1) * 5 + length, fence, 2);
  const Buffer<int32_t> starts(lines, fence), offsets(kinds * columns, fence), places(pixels, fence);
  const Buffer<int32_t> sums(pixels * columns, fence), want(pixels * columns, fence);
  for (int64_t l = 0; l < lines; ++l) starts[l] = int32_t(5 * l);
  for (int64_t i = 0; i < kinds * columns; ++i) offsets[i] = int32_t(i * 77 - 900);
  for (int64_t p = 0; p < pixels; ++p) places[p] = int32_t(p % kinds * columns);
  kernels.multiply(image.data(), step, pixels, {starts.data(), lines, length}, turned.data(), offsets.data(), places.data(), unit,
                   sums.data());
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < columns; ++c) {
      int32_t count = 0;
      for (int64_t k = 0; k < words; ++k)
        count += std::popcount(image[p * step + k / length * 5 + k % length] ^ want_turned[k * columns + c]);
      want[p * columns + c] = offsets[places[p] + c] + (unit ? count : -2 * count);
    }
  expect_same(sums, want, what);
  return 2;
}

int64_t check_bits(const BinaryColumnKernels& kernels, Fence fence, int64_t pixels, int channels) {
  const int64_t step = 8;
  const uint32_t flip = 0xa5a50f0f;
  const Noise<int32_t> sums(pixels * columns, fence, 3), threshold(channels, fence, 4);
  const Buffer<uint8_t> bits((pixels - 1) * step + 4, fence), want((pixels - 1) * step + 4, fence);
  kernels.compare(sums.data(), pixels, channels, threshold.data(), flip, bits.data(), step);
  for (int64_t p = 0; p < pixels; ++p) {
    uint32_t word = 0;
    for (int c = 0; c < channels; ++c) word |= uint32_t((sums[p * columns + c] < threshold[c]) != (flip >> c & 1)) << c;
    std::memcpy(want.data() + p * step, &word, 4);
  }
  expect_same(bits, want, "columns: bits of " + std::to_string(pixels) + " pixels, " + std::to_string(channels) + " channels");
  return 1;
}

}  // namespace

int64_t check_binary_columns(Isa isa, Fence fence) {
  quantize::set_cpu_isa(isa);
  if (!binary_column_kernels()) return 0;
  const BinaryColumnKernels& kernels = *binary_column_kernels();
  int64_t count = 0;
  for (int channels : {1, 15, 16, 17, 32}) {
    for (int64_t pixels : {1, 7, 8, 9, 33, 64})
      for (int64_t lines : {1, 3})
        for (int64_t length : {2, 6, 20}) count += check_products(kernels, fence, pixels, lines, length, channels);
    for (int64_t pixels : {1, 40}) count += check_bits(kernels, fence, pixels, channels);
  }
  return count;
}

}  // namespace sanitize
