// Fake quantization and the learned step: the CUDA kernels return the CPU's bits.
#include "weight/channel_quantize.cuh"
#include "weight/channel_quantize_run.h"
#include "weight/elementwise.cuh"
#include "weight/lsq_run.h"

#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::weight;

template <typename T>
int64_t check_channels(const Case& c, Pattern pattern, const Codebook& book) {
  const int64_t channels = c.samples, n = c.elements;
  const Buffer<T> w(channels * n, 0), y(channels * n, 0), gradient(channels * n, 0);
  const Buffer<float> scale(channels, 0), limit(channels, 0);
  fill(w, pattern);
  simt::Launcher launch(1);
  launch_quantize_channels(static_cast<const T*>(w.data()), channels, n, book, y.data(), scale.data(), limit.data(), launch);
  launch_clip_channels(static_cast<const T*>(w.data()), static_cast<const T*>(w.data()), static_cast<const float*>(limit.data()), channels,
                       n, gradient.data(), launch);
  const std::string what = "channel_quantize: " + name(c) + ", pattern " + std::to_string(int(pattern));
  std::vector<T> want(channels * n), want_gradient(channels * n);
  for (int64_t channel = 0; channel < channels; ++channel) {
    const T* row = w.data() + channel * n;
    const ChannelScale own = quantize_channel<T>(row, n, book, want.data() + channel * n);
    clip_channel<T>(row, row, n, own.limit, want_gradient.data() + channel * n);
    const float got[] = {scale.data()[channel], limit.data()[channel]}, expected[] = {own.scale, own.limit};
    for (int i = 0; i < 2; ++i)
      if (got[i] != expected[i] && !(std::isnan(got[i]) && std::isnan(expected[i])))
        fail(what + ": scale or limit of channel " + std::to_string(channel) + " is " + std::to_string(got[i]) + ", expected " +
             std::to_string(expected[i]));
  }
  expect_same_values(y.data(), want, what);
  expect_same_values(gradient.data(), want_gradient, what + ", gradient");
  return 1;
}

template <typename T>
int64_t check_step(int64_t n, Pattern pattern, float step, float zero_point, int levels) {
  const Buffer<T> x(n, 0), y(n, 0), grad_x(n, 0);
  const Buffer<float> sums(ElementTraits::sums, 0);
  fill(x, pattern);
  simt::Launcher launch(1);
  launch(lsq_elements<T>, dim3(3), ElementTraits::threads, static_cast<const T*>(x.data()), n, &step, &zero_point, levels, y.data());
  launch(lsq_gradients<T>, dim3(2), ElementTraits::threads, static_cast<const T*>(x.data()), static_cast<const T*>(x.data()), n, &step,
         &zero_point, levels, grad_x.data(), sums.data());
  const LsqRange range = lsq_range(step, zero_point, levels);
  std::vector<T> want(n), want_gradient(n);
  quantize_run<T>(x.data(), n, range, want.data());
  const float total = backward_run<T>(x.data(), x.data(), n, range, want_gradient.data()), got = sums.data()[0] + sums.data()[1];
  const std::string what = "lsq: " + std::to_string(n) + " elements, pattern " + std::to_string(int(pattern));
  expect_same_values(y.data(), want, what);
  expect_same_values(grad_x.data(), want_gradient, what + ", gradient");
  // Another order of summation.
  if (!(std::fabs(got - total) <= 1e-4f * std::fabs(total) + 1e-4f) && !(std::isnan(got) && std::isnan(total)) && got != total)
    fail(what + ": the step's gradient is " + std::to_string(got) + ", expected " + std::to_string(total));
  return 1;
}

template <typename T>
int64_t check() {
  int64_t count = 0;
  for (const Case& c : {Case{1, 1, 0}, {3, 7, 0}, {9, 16, 0}, {8, 27, 0}, {17, 33, 0}, {2, 257, 0}})
    for (Pattern pattern : kPatterns) {
      count += check_channels<T>(c, pattern, make_ternary_codebook());
      for (int bits : {2, 4, 8})
        for (bool least_squares : {false, true})
          for (int kind : {0, 1, 2}) count += check_channels<T>(c, pattern, make_codebook(kind > 0, kind == 2, bits, least_squares));
    }
  for (int64_t n : {1, 31, 257, 2000})
    for (Pattern pattern : kPatterns) {
      count +=
          check_step<T>(n, pattern, 0.13f, 0.f, 255) + check_step<T>(n, pattern, 0.5f, 7.f, 14) + check_step<T>(n, pattern, -1.f, 1.f, 3);
      const Buffer<T> x(n, 0), y(n, 0);
      fill(x, pattern);
      for (bool plus : {false, true}) {
        simt::Launcher launch(1);
        launch(round_elements<T>, dim3(2), ElementTraits::threads, static_cast<const T*>(x.data()), n, plus, y.data());
        std::vector<T> want(n);
        for (int64_t i = 0; i < n; ++i) want[i] = round_power_of_two(x.data()[i], plus);
        expect_same_values(y.data(), want, "power_of_two");
        ++count;
      }
    }
  return count;
}

}  // namespace

int64_t check_weight() { return check<F32>() + check<BF16>() + check<F16>(); }

}  // namespace cuda_on_host
