// smooth_derivative: the CUDA kernels against the CPU's vectors, bit for bit, and both against the functions' definitions in double.
#include "layers/smooth.cuh"

#include "harness.h"
#include "layers/smooth_run.h"

namespace cuda_on_host {
namespace {

using namespace quantize::layers;

double exact(Smooth function, double x) {
  const double s = 1 / (1 + std::exp(-x)), normal = std::erfc(-x / std::sqrt(2.)) / 2, density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
  const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (x + 0.044715 * x * x * x)), m = std::tanh(std::log1p(std::exp(x)));
  switch (function) {
    case Smooth::silu:
      return s * (1 + x * (1 - s));
    case Smooth::hardswish:
      return x < -3 ? 0 : x <= 3 ? x / 3 + 0.5 : 1;
    case Smooth::mish:
      return m + x * s * (1 - m * m);
    case Smooth::gelu:
      return normal + x * density;
    default:
      return (1 + t) / 2 + x * (1 - t * t) / 2 * k * (1 + 3 * 0.044715 * x * x);
  }
}

template <typename T>
int64_t check(int64_t n, size_t offset) {
  static constexpr SmoothKernel vectors[3][5] = QUANTIZE_SMOOTH_KERNELS;
  int64_t count = 0;
  for (int f = 0; f < 5; ++f) {
    const std::string what =
        "smooth: type " + std::to_string(int(T::scalar)) + ", function " + std::to_string(f) + ", n " + std::to_string(n);
    const Buffer<T> x(n, offset), y(n, offset);
    for (int64_t i = 0; i < n; ++i) x.data()[i] = round_nearest(float(i - n / 2) * 40.f / float(n), T{});
    const float special[] = {NAN, 1e30f, -1e30f, 3.f, -3.f, -0.f, 88.f, -104.f};
    for (int64_t i = 0; i < 8 && 2 * i < n; ++i) x.data()[2 * i] = round_nearest(special[i], T{});
    std::vector<T> want(n);
    vectors[int(T::scalar)][f](x.data(), n, want.data());
    simt::Launcher launch(1);
    launch_smooth(Smooth(f), static_cast<const T*>(x.data()), n, y.data(), launch);
    expect_same_values(y.data(), want, what);
    const double step = T::scalar == quantize::Scalar::f32 ? 4e-7 : T::scalar == quantize::Scalar::f16 ? 1e-3 : 8e-3;
    for (int64_t i = 0; i < n; ++i, ++count) {
      const float from = to_float(x.data()[i]), got = to_float(want[i]);
      if (std::isnan(from) ? std::isnan(got)
                           : std::isinf(from) || std::fabs(got - exact(Smooth(f), std::clamp(from, -200.f, 200.f))) <= step)
        continue;
      fail(what + ": of " + std::to_string(from) + " it is " + std::to_string(got));
    }
  }
  return count;
}

}  // namespace

int64_t check_smooth() {
  int64_t count = 0;
  for (int64_t n : {1, 7, 16, 33, 1000, 4099})
    for (size_t offset : {0, 1})
      count += check<quantize::F32>(n, offset) + check<quantize::F16>(n, offset) + check<quantize::BF16>(n, offset);
  return count;
}

}  // namespace cuda_on_host
