// smooth_derivative and products: the values of every ISA are the portable ones, bit for bit.
#include "layers/smooth_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::layers::Smooth;
using quantize::layers::SmoothKernel;

SmoothKernel kernel(Isa isa, int scalar, int function) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return quantize::layers::smooth_avx512[scalar][function];
  if (isa == Isa::avx2) return quantize::layers::smooth_avx2[scalar][function];
#endif
  return quantize::layers::smooth_portable[scalar][function];
}

quantize::layers::MultiplyKernel multiply(Isa isa, int scalar) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return quantize::layers::multiply_avx512[scalar];
  if (isa == Isa::avx2) return quantize::layers::multiply_avx2[scalar];
#endif
  return quantize::layers::multiply_portable[scalar];
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> x(n, fence), other(n, fence), got(n, fence), want(n, fence);
    fill(other, kPatterns[0]);
    for (Pattern pattern : kPatterns) {
      fill(x, pattern);
      multiply(isa, int(T::scalar))(x.data(), other.data(), n, got.data());
      multiply(Isa::portable, int(T::scalar))(x.data(), other.data(), n, want.data());
      expect_same(got, want, "multiply: n " + std::to_string(n) + ", " + kPatternNames[int(pattern)]);
      std::copy(x.data(), x.data() + n, got.data());
      multiply(isa, int(T::scalar))(got.data(), other.data(), n, got.data());
      expect_same(got, want, "multiply in place: n " + std::to_string(n) + ", " + kPatternNames[int(pattern)]);
      ++count;
      for (int function = 0; function < 5; ++function, ++count) {
        kernel(isa, int(T::scalar), function)(x.data(), n, got.data());
        kernel(Isa::portable, int(T::scalar), function)(x.data(), n, want.data());
        expect_same(got, want,
                    "smooth: n " + std::to_string(n) + ", function " + std::to_string(function) + ", " + kPatternNames[int(pattern)]);
      }
    }
  }
  return count;
}

}  // namespace

int64_t check_smooth(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
