// group_quantize: pack and unpack, whole runs and pieces of one long group.
#include "activation/group_quantize_kernels.h"

#include <algorithm>

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::activation;
using quantize::Isa;
using quantize::Seed;

constexpr Seed kSeed{0x0123456789abcdefull, 42};
constexpr uint32_t kFirstGroup = 0xfffffff0u;  // group numbers use all their bits

const GroupKernels& kernels(Isa isa, int scalar, int column) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return group_kernels_avx512[scalar][column];
  if (isa == Isa::avx2) return group_kernels_avx2[scalar][column];
#endif
  return group_kernels_portable[scalar][column];
}

template <typename T>
struct Packed {
  Buffer<uint8_t> codes;
  Buffer<uint16_t> ranges;
  Buffer<T> unpacked;

  Packed(const GroupKernels& k, const Buffer<T>& x, GroupRun run, int bits, Fence fence)
      : codes(sample_code_bytes(run.elements, run.group_size, bits), fence),
        ranges(2 * ((run.elements + run.group_size - 1) / run.group_size), fence),
        unpacked(run.elements, fence) {
    k.quantize(x.data(), run, kSeed, codes.data(), ranges.data());
    k.dequantize(codes.data(), ranges.data(), run, kSeed, unpacked.data());
  }
};

// The same bytes, made of pieces as threads that share a group make them.
template <typename T>
void check_pieces(const GroupKernels& k, const Buffer<T>& x, const Packed<T>& whole, int64_t n, int bits, Fence fence) {
  constexpr int64_t step = 2 * GroupTraits::chunk;
  const Range range = load_range<T>({whole.ranges[0], whole.ranges[1]}, bits);
  Buffer<uint8_t> codes(code_bytes(n, bits), fence);
  Buffer<T> unpacked(n, fence);
  for (int64_t begin = 0; begin < n; begin += step) {
    const GroupPiece piece{begin, std::min(step, n - begin), n, kFirstGroup};
    Buffer<T> until_end(begin + piece.elements, fence);  // whoever makes this piece has no business behind it
    std::memcpy(static_cast<void*>(until_end.data()), x.data(), until_end.bytes());
    const Extent part = k.extent(until_end.data() + begin, piece.elements);
    if (part.finite && !(part.min <= part.max)) fail("extent: min exceeds max");
    k.quantize_piece(until_end.data(), piece, range, kSeed, codes.data());
  }
  expect_same(codes, whole.codes, "quantize_piece");
  for (int64_t begin = 0; begin < n; begin += step)
    k.dequantize_piece(codes.data(), {begin, std::min(step, n - begin), n, kFirstGroup}, range, kSeed, unpacked.data());
  expect_same(unpacked, whole.unpacked, "dequantize_piece");
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int column = 0; column < 4; ++column) {
    const int bits = 1 << column;
    const GroupKernels& k = kernels(isa, int(T::scalar), column);
    const GroupKernels& portable = kernels(Isa::portable, int(T::scalar), column);
    for (int64_t n : kSizes) {
      Buffer<T> x(n, fence);
      for (Pattern pattern : kPatterns) {
        fill(x, pattern);
        for (int64_t group_size : {int64_t(1), int64_t(7), int64_t(100), int64_t(128), int64_t(256), n}) {
          if (group_size > n) continue;
          const GroupRun run{n, group_size, kFirstGroup};
          const Packed<T> got(k, x, run, bits, fence), want(portable, x, run, bits, fence);
          const std::string what = std::string(isa_name(isa)) + ", type " + std::to_string(int(T::scalar)) + ", " + std::to_string(bits) +
                                   " bits, n " + std::to_string(n) + ", group " + std::to_string(group_size) + ", pattern " +
                                   kPatternNames[int(pattern)];
          expect_same(got.ranges, want.ranges, "ranges: " + what);
          expect_same(got.codes, want.codes, "codes: " + what);
          expect_same(got.unpacked, want.unpacked, "unpacked: " + what);
          if (group_size == n) check_pieces(k, x, got, n, bits, fence);
          ++count;
        }
      }
    }
  }
  return count;
}

}  // namespace

int64_t check_group_quantize(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
