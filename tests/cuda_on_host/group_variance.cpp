// group_variance: the CUDA kernels against the specification's terms, summed up in double.
#include "activation/group_variance.cuh"

#include "activation/group_quantize_scalar.h"
#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::activation;

template <typename T>
float reference(const T* x, int64_t n, int64_t group_size, int bits) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += group_size) {
    const int64_t end = std::min(n, begin + group_size);
    const Range range = load_range<T>(store_range<T>(scalar_extent(x + begin, end - begin), bits), bits);
    if (is_poisoned(range)) return NAN;
    if (range.extreme || range.fixed_point == 0.f) continue;
    for (int64_t e = begin; e < end; ++e) {
      const float f = std::fmaf(to_float(x[e]) - range.min, 1.f / range.scale, -0.5f), d = f - std::nearbyintf(f);
      total += (0.25 - double(d) * double(d)) * double(range.scale) * double(range.scale);
    }
  }
  return float(total);
}

template <typename T>
int64_t check() {
  int64_t count = 0;
  for (const Case& c : kCases)
    for (Pattern pattern : kPatterns)
      for (size_t offset : {0, 1}) {
        if (pattern != Pattern::noise && (offset > 0 || c.samples * c.elements > 2500)) continue;
        PackedGroups p{};
        p.samples = c.samples, p.elements = c.elements, p.group_size = c.group_size, p.bits = 1;
        p.groups = (c.elements + c.group_size - 1) / c.group_size;
        const Buffer<T> x(c.samples * c.elements, offset);
        fill(x, pattern);
        const Buffer<float> variance(4 * c.samples, 0);
        simt::Launcher launch(1);
        launch_variance(p, static_cast<const T*>(x.data()), variance.data(), launch);
        for (int64_t i = 0; i < 4 * c.samples; ++i) {
          const float want = reference(x.data() + i / 4 * c.elements, c.elements, c.group_size, 1 << i % 4), got = variance.data()[i];
          // Lanes add up hundreds of floats of one sign at the most.
          if (got != want && !(std::fabs(got - want) <= 1e-5f * want) && !(std::isnan(got) && std::isnan(want)))
            fail("group_variance: " + name(c) + ", pattern " + std::to_string(int(pattern)) + ", item " + std::to_string(i) + " is " +
                 std::to_string(got) + ", expected " + std::to_string(want));
          ++count;
        }
      }
  return count;
}

}  // namespace

int64_t check_group_variance() { return check<F32>() + check<BF16>() + check<F16>(); }

}  // namespace cuda_on_host
