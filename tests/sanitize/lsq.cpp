// lsq: values, gradients and the step's sum of every ISA are the portable ones, bit for bit.
#include "weight/lsq_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::weight::lsq_kernels;
using quantize::weight::lsq_range;

template <typename T>
int64_t check(Isa isa, Fence fence) {
  const auto &k = lsq_kernels(isa, T::scalar), &portable = lsq_kernels(Isa::portable, T::scalar);
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> x(n, fence), grad(n, fence), y(n, fence), want(n, fence);
    Buffer<float> sum(1, fence), want_sum(1, fence);
    fill(grad, Pattern::noise);
    for (Pattern pattern : kPatterns) {
      fill(x, pattern);
      for (const int levels : {2, 3, 15, 255})
        for (const float step : {0.3f, 1e-3f, 0.f, 1e30f, std::numeric_limits<float>::quiet_NaN()})
          for (const float zero_point : {0.f, float((levels + 1) / 2)}) {
            const auto range = lsq_range(step, zero_point, levels);
            const std::string what = "n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)] + ", " + std::to_string(levels) +
                                     " levels, step " + std::to_string(step);
            portable.quantize(x.data(), n, range, want.data());
            k.quantize(x.data(), n, range, y.data());
            expect_same(y, want, "lsq: " + what);
            want_sum[0] = portable.backward(grad.data(), x.data(), n, range, want.data());
            sum[0] = k.backward(grad.data(), x.data(), n, range, y.data());
            expect_same(y, want, "lsq's gradient: " + what);
            expect_same(sum, want_sum, "lsq's step: " + what);
            count += 3;
          }
    }
  }
  return count;
}

}  // namespace

int64_t check_lsq(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
