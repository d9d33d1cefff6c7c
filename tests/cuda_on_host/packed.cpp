// Groups with bits of their own: the stream is read bit by bit, and weights are computed one by one.
#include "packed/decode_groups.cuh"

#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::packed;

struct Groups {
  int64_t numel, size, span;
};

template <typename T>
int64_t check(const Groups& c, int most) {
  const int64_t groups = (c.numel + c.size - 1) / c.size, rows = (c.numel + c.span - 1) / c.span;
  std::vector<int64_t> offsets(groups), places(c.numel);
  std::vector<int> bits(groups);
  const Buffer<uint8_t> group_bits((groups + 1) / 2, 0);
  std::memset(group_bits.data(), 0, group_bits.bytes());
  int64_t units = 0, length = 0;
  for (int64_t g = 0; g < groups; ++g) {
    bits[g] = 1 + int(quantize::hash32(uint32_t(g)) % uint32_t(most));
    group_bits.data()[g / 2] |= uint8_t((bits[g] - 1) << (g % 2 * 4));
    offsets[g] = units;
    units += bits[g];
  }
  for (int64_t i = 0; i < c.numel; ++i) {
    places[i] = length;
    length += bits[i / c.size];
  }
  const Buffer<uint8_t> codes((length + 7) / 8, 0);
  for (size_t i = 0; i < codes.bytes(); ++i) codes.data()[i] = uint8_t(quantize::hash32(uint32_t(i) + 7));
  const Buffer<float> scales(2 * rows, 0), weights(c.numel, 0);
  for (int64_t i = 0; i < 2 * rows; ++i) scales.data()[i] = pattern_value(i % 6 ? Pattern::noise : Pattern::huge, i);
  const Buffer<T> values(c.numel, 0);
  simt::Launcher launch(1);
  launch(unpack_groups<T>, dim3(2), GroupTraits::threads, static_cast<const uint8_t*>(codes.data()), int64_t(codes.bytes()),
         static_cast<const uint8_t*>(group_bits.data()), static_cast<const int64_t*>(offsets.data()), c.size, c.numel, values.data());
  launch(decode_groups<T>, dim3(3), GroupTraits::threads, static_cast<const T*>(values.data()),
         static_cast<const uint8_t*>(group_bits.data()), static_cast<const float*>(scales.data()), c.size, c.span, c.numel, weights.data());
  std::vector<T> codes_wanted(c.numel);
  std::vector<float> wanted(c.numel);
  for (int64_t i = 0; i < c.numel; ++i) {
    uint32_t code = 0;
    for (int b = 0; b < bits[i / c.size]; ++b) code |= uint32_t(codes.data()[(places[i] + b) / 8] >> ((places[i] + b) % 8) & 1) << b;
    codes_wanted[i] = T(code);
    const float* scale = scales.data() + i / c.span * 2;
    const float step = scale[1] / float((1 << bits[i / c.size]) - 1), product = float(code) * step;
    wanted[i] = scale[0] + product;
  }
  const std::string what = std::to_string(c.numel) + " codes in groups of " + std::to_string(c.size);
  expect_same(values.data(), codes_wanted, "unpack_groups: " + what);
  expect_same(weights.data(), wanted, "decode_groups: " + what);
  return 2;
}

}  // namespace

int64_t check_packed() {
  int64_t count = 0;
  for (const Groups& c : {Groups{1, 1, 1}, {7, 3, 7}, {64, 8, 9}, {513, 8, 27}, {1000, 1, 100}, {257, 257, 257}, {2304, 24, 24}})
    for (int most : {1, 3, 8}) count += check<uint8_t>(c, most) + check<uint16_t>(c, 2 * most);
  return count;
}

}  // namespace cuda_on_host
