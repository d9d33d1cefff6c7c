// group_quantize and group_dequantize: the CUDA kernels against the specification's scalar arithmetic.
#include "activation/group_quantize.cuh"
#include "activation/group_dequantize.cuh"
#include "activation/group_quantize_scalar.h"
#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::activation;
using quantize::Scalar;
using quantize::Seed;

constexpr Seed kSeed{0x0123456789abcdefull, 42};

template <typename T>
struct Packed {
  std::vector<uint8_t> codes;
  std::vector<uint32_t> ranges;
  std::vector<T> unpacked;
};

// One sample after the other, group by group, as group_format.h says.
template <typename T, int bits>
void reference_sample(const T* x, const PackedGroups& p, int64_t sample, uint8_t* codes, Packed<T>& packed) {
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t first = group * p.group_size, n = std::min(p.group_size, p.elements - first);
    const uint32_t number = uint32_t(sample * p.groups + group);
    const StoredRange stored = store_range<T>(scalar_extent(x + first, n), bits);
    const Range range = load_range<T>(stored, bits);
    packed.ranges[number] = uint32_t(stored.second) << 16 | stored.first;
    if (is_poisoned(range))
      clear_codes<bits>(0, n, n, codes);
    else
      scalar_encode<T, bits>(x + first, 0, n, n, number, range, p.seed, codes);
    scalar_decode<T, bits>(codes, 0, n, n, number, range, p.seed, packed.unpacked.data() + sample * p.elements + first);
    codes += code_bytes(n, bits);
  }
}

template <typename T>
Packed<T> reference(const T* x, const PackedGroups& p, const std::vector<uint8_t>& sample_bits, int64_t bytes) {
  Packed<T> packed{std::vector<uint8_t>(bytes, 0xa5), std::vector<uint32_t>(p.samples * p.groups), std::vector<T>(p.samples * p.elements)};
  uint8_t* codes = packed.codes.data();
  for (int64_t sample = 0; sample < p.samples; ++sample, x += p.elements) {
    const int bits = sample_bits.empty() ? p.bits : sample_bits[sample];
    const auto run = bits == 1   ? reference_sample<T, 1>
                     : bits == 2 ? reference_sample<T, 2>
                     : bits == 4 ? reference_sample<T, 4>
                                 : reference_sample<T, 8>;
    run(x, p, sample, codes, packed);
    codes += sample_code_bytes(p.elements, p.group_size, bits);
  }
  return packed;
}

template <typename T>
void check_case(const Case& c, const std::vector<uint8_t>& sample_bits, int bits, Pattern pattern, size_t offset, const std::string& what) {
  PackedGroups p{};
  p.samples = c.samples, p.elements = c.elements, p.group_size = c.group_size, p.bits = bits, p.seed = kSeed;
  p.groups = (c.elements + c.group_size - 1) / c.group_size;
  int64_t bytes = 0;
  for (int64_t n = 0; n < c.samples; ++n) bytes += sample_code_bytes(c.elements, c.group_size, sample_bits.empty() ? bits : sample_bits[n]);
  // Buffers end where their contents do, and start at `offset` elements from a 16-byte boundary.
  const Buffer<T> x(c.samples * c.elements, offset), y(c.samples * c.elements, offset);
  fill(x, pattern);
  const Buffer<uint8_t> codes(bytes, offset);
  const Buffer<uint32_t> ranges(p.samples * p.groups, 0);
  p.capacity = bytes;
  simt::Launcher launch(1);
  if (!sample_bits.empty()) {
    p.sample_bits = sample_bits.data();
    auto* offsets = launch.scratch<int64_t>(p.samples + 1);
    launch(sample_offsets, dim3(1), PlaceTraits::threads, p, offsets);
    p.offsets = offsets;
  }
  const Packed<T> want = reference(x.data(), p, sample_bits, bytes);
  const GroupPlan plan(p, x.data(), sizeof(T), codes.data());
  launch_quantize(plan, static_cast<const T*>(x.data()), codes.data(), ranges.data(), launch);
  expect_same(ranges.data(), want.ranges, what + ": ranges");
  expect_same(codes.data(), want.codes, what + ": codes");
  const GroupPlan back(p, y.data(), sizeof(T), codes.data());
  launch_dequantize(back, static_cast<const uint8_t*>(codes.data()), static_cast<const uint32_t*>(ranges.data()), y.data(), launch);
  expect_same_values(y.data(), want.unpacked, what + ": unpacked");
}

// What does not fit decodes to NaN, and nothing behind the codes is written.
template <typename T>
void check_overflow(const Case& c) {
  PackedGroups p{};
  p.samples = c.samples, p.elements = c.elements, p.group_size = c.group_size, p.seed = kSeed;
  p.groups = (c.elements + c.group_size - 1) / c.group_size;
  std::vector<uint8_t> bits(c.samples, 2);
  bits.front() = 3;  // no width
  const int64_t per_sample = sample_code_bytes(c.elements, c.group_size, 2);
  p.capacity = per_sample * (c.samples - 2);  // the last does not fit
  p.sample_bits = bits.data();
  const Buffer<T> x(c.samples * c.elements, 0), y(c.samples * c.elements, 0);
  fill(x, Pattern::noise);
  const Buffer<uint8_t> codes(p.capacity, 0);
  const Buffer<uint32_t> ranges(p.samples * p.groups, 0);
  simt::Launcher launch(1);
  auto* offsets = launch.scratch<int64_t>(p.samples + 1);
  launch(sample_offsets, dim3(1), PlaceTraits::threads, p, offsets);
  p.offsets = offsets;
  const GroupPlan plan(p, x.data(), sizeof(T), codes.data());
  launch_quantize(plan, static_cast<const T*>(x.data()), codes.data(), ranges.data(), launch);
  launch_dequantize(plan, static_cast<const uint8_t*>(codes.data()), static_cast<const uint32_t*>(ranges.data()), y.data(), launch);
  for (int64_t i = 0; i < c.samples * c.elements; ++i) {
    const int64_t sample = i / c.elements;
    const bool poisoned = sample == 0 || sample == c.samples - 1;
    if (std::isnan(to_float(y.data()[i])) != poisoned) fail("overflow: element " + std::to_string(i));
  }
}

template <typename T>
int64_t check() {
  int64_t count = 0;
  const auto run = [&](const Case& c, int bits, Pattern pattern, size_t offset) {
    std::vector<uint8_t> sample_bits;
    for (int64_t n = 0; bits == 0 && n < c.samples; ++n) sample_bits.push_back(uint8_t(1 << (n * 3 + c.elements) % 4));
    const std::string what = "type " + std::to_string(int(T::scalar)) + ", " + name(c) + ", bits " + std::to_string(bits) + ", pattern " +
                             std::to_string(int(pattern)) + ", offset " + std::to_string(offset);
    check_case<T>(c, sample_bits, bits, pattern, offset, what);
    ++count;
  };
  for (const Case& c : kCases) {
    check_overflow<T>({std::max<int64_t>(3, c.samples), c.elements, c.group_size});
    for (int bits : {1, 2, 4, 8, 0}) {                      // 0: mixed
      if (T::scalar == Scalar::f16 && bits != 2) continue;  // bf16 has proved its lanes
      run(c, bits, Pattern::noise, 0);
      run(c, bits, Pattern::noise, 1);
      for (Pattern pattern : kPatterns)
        if (pattern != Pattern::noise && c.samples * c.elements < 2500) run(c, bits, pattern, 0);
    }
    for (Pattern pattern : {Pattern::rectified, Pattern::poisoned, Pattern::offset}) run(c, 2, pattern, 0);
  }
  for (const Case& c : kLongCases)
    for (int bits : {2, 0})
      if (T::scalar != Scalar::f16) run(c, bits, Pattern::noise, 0);
  return count;
}

template <int V, int bits>
void check_layout() {
  using L = Lanes<V>;
  using C = CodeLayout<V, bits>;
  std::vector<int> seen(L::elements * bits / 32);
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < C::registers; ++reg) {
      const int target = C::target(lane, reg);
      if (target != C::target(lane, 0) + C::target(0, reg)) fail("targets are not linear");
      ++seen[target];
    }
    for (int row = 0; row < L::rows; ++row)
      for (int i = 0; i < V; ++i) {
        const int element = row * L::row_elements + lane * V + i;
        const int64_t bit = code_bit(element, L::elements, bits);
        if (bit / 32 != C::dword(lane, row, i) || bit % 32 != C::shift(lane, row)) fail("CodeLayout is not code_bit");
        if (C::dword(lane, row, i) != C::dword(lane, 0, 0) + C::dword(0, row, i)) fail("dwords are not linear");
        if (C::shift(lane, row) != C::shift(lane, 0) + C::shift(0, row)) fail("shifts are not linear");
      }
  }
  for (int count : seen)
    if (count != 1) fail("a word of codes has not one writer");
}

}  // namespace

int64_t check_group_quantize() {
  check_layout<4, 1>(), check_layout<4, 2>(), check_layout<4, 4>(), check_layout<4, 8>();
  check_layout<8, 1>(), check_layout<8, 2>(), check_layout<8, 4>(), check_layout<8, 8>();
  return check<quantize::F32>() + check<quantize::BF16>() + check<quantize::F16>();
}

}  // namespace cuda_on_host
