// group_variance: the sums of every ISA are the portable ones, bit for bit.
#include "activation/group_variance_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::activation::GroupVarianceKernel;

GroupVarianceKernel kernel(Isa isa, int scalar) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return quantize::activation::group_variance_avx512[scalar];
  if (isa == Isa::avx2) return quantize::activation::group_variance_avx2[scalar];
#endif
  return quantize::activation::group_variance_portable[scalar];
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> x(n, fence);
    for (Pattern pattern : kPatterns) {
      fill(x, pattern);
      for (int64_t group_size : {int64_t(1), int64_t(7), int64_t(100), int64_t(256), n}) {
        if (group_size > n) continue;
        Buffer<double> got(4, fence), want(4, fence);
        for (int i = 0; i < 4; ++i) got[i] = want[i] = 0;
        kernel(isa, int(T::scalar))(x.data(), n, group_size, got.data());
        kernel(Isa::portable, int(T::scalar))(x.data(), n, group_size, want.data());
        expect_same(
            got, want,
            "group_variance: n " + std::to_string(n) + ", group " + std::to_string(group_size) + ", " + kPatternNames[int(pattern)]);
        ++count;
      }
    }
  }
  return count;
}

}  // namespace

int64_t check_group_variance(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
