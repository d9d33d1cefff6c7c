// decode_groups against group_scale and group_value, to the bit.
#include "harness.h"
#include "packed/decode_kernels.h"
#include "packed/group_codes.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

DecodeGroups kernel(Isa isa, int bytes) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return decode_groups_avx512[bytes - 1];
  if (isa == Isa::avx2) return decode_groups_avx2[bytes - 1];
#endif
  return decode_groups_portable[bytes - 1];
}

template <typename T>
int64_t check(Isa isa, Fence fence, int64_t numel, int64_t group_size, int64_t span) {
  const int64_t groups = (numel + group_size - 1) / group_size, rows = (numel + span - 1) / span;
  const Noise<T> values(numel, fence, 1);
  const Noise<uint8_t> group_bits((groups + 1) / 2, fence, 2);
  const Buffer<float> scales(2 * rows, fence), want(numel, fence);
  for (int64_t i = 0; i < 2 * rows; ++i) scales[i] = 0.013f * float(int(quantize::hash32(uint32_t(i)) % 1000) - 300);
  for (int64_t i = 0; i < numel; ++i)
    want[i] = group_value(group_scale(scales.data() + i / span * 2, bits_of_group(group_bits.data(), i / group_size)), values[i]);
  int64_t count = 0;
  for (int64_t begin : {int64_t(0), numel / 3, numel - 1}) {
    const Buffer<float> got(numel, fence);
    for (int64_t i = 0; i < numel; ++i) got[i] = want[i];
    const int64_t end = begin ? numel : numel - numel / 4;
    for (int64_t i = begin; i < end; ++i) got[i] = -1.f;
    kernel(isa, sizeof(T))(values.data(), group_bits.data(), scales.data(), begin, end, group_size, span, got.data());
    expect_same(got, want,
                "decode_groups: " + std::to_string(numel) + " in groups of " + std::to_string(group_size) + ", spans of " +
                    std::to_string(span) + ", from " + std::to_string(begin));
    ++count;
  }
  return count;
}

}  // namespace

int64_t check_decode_groups(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int64_t numel : kSizes)
    for (int64_t group_size : {1, 3, 8, 16, 300})
      for (int64_t span : {9, 64, 2000})
        count += check<uint8_t>(isa, fence, numel, group_size, span) + check<uint16_t>(isa, fence, numel, group_size, span);
  return count;
}

}  // namespace sanitize
