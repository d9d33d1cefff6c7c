// sample_energy: the sums of every ISA are the portable ones, bit for bit.
#include "layers/energy_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::layers::EnergyKernel;

EnergyKernel kernel(Isa isa, int scalar) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return quantize::layers::energy_avx512[scalar];
  if (isa == Isa::avx2) return quantize::layers::energy_avx2[scalar];
#endif
  return quantize::layers::energy_portable[scalar];
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> x(n, fence);
    Buffer<double> got(1, fence), want(1, fence);
    for (Pattern pattern : kPatterns) {
      fill(x, pattern);
      got[0] = kernel(isa, int(T::scalar))(x.data(), n), want[0] = kernel(Isa::portable, int(T::scalar))(x.data(), n);
      expect_same(got, want, "energy: n " + std::to_string(n) + ", " + kPatternNames[int(pattern)]);
      ++count;
    }
  }
  return count;
}

}  // namespace

int64_t check_energy(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
