// DoReFa's weights and rounded gradients: the CUDA kernels return the CPU's bits.
#pragma GCC diagnostic ignored "-Wunused-function"  // of diffq, whose noise and exponential these have
#include "weight/dorefa.cuh"
#include "weight/dorefa_run.h"

#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::weight;
using quantize::Seed;

std::string named(const char* what, int64_t n, Pattern pattern) {
  return std::string(what) + ": " + std::to_string(n) + " elements, pattern " + std::to_string(int(pattern));
}

void expect_floats(const float* got, const std::vector<float>& want, const std::string& what) {
  expect_same_values(reinterpret_cast<const F32*>(got),
                     std::vector<F32>(reinterpret_cast<const F32*>(want.data()), reinterpret_cast<const F32*>(want.data() + want.size())),
                     what);
}

template <typename T>
int64_t check_dorefa(int64_t n, Pattern pattern, int bits, bool adjusted) {
  const Buffer<T> w(n, 0), grad(n, 0), y(n, 0), out(n, 0);
  const Buffer<float> scale(1, 0), stats(3, 0);
  fill(w, pattern), fill(grad, Pattern::noise);
  simt::Launcher launch(1);
  launch_dorefa(static_cast<const T*>(w.data()), n, bits, adjusted, y.data(), scale.data(), stats.data(), launch);
  const int64_t pieces = (n + dorefa_piece - 1) / dorefa_piece;
  const auto total = [&](const auto& value) {
    double part[binary_sums] = {};
    for (int64_t p = 0; p < pieces; ++p)
      part[p % binary_sums] += double(value(w.data() + p * dorefa_piece, std::min(dorefa_piece, n - p * dorefa_piece), p));
    return join_parts(part);
  };
  const std::string what = named("dorefa", n, pattern) + ", " + std::to_string(bits) + " bits";
  std::vector<T> want(n), want_out(n);
  if (bits == 1) {
    const float step = float(total([](const T* x, int64_t count, int64_t) { return magnitudes_of<T>(x, count); }) / double(n));
    sign_with_step<T>(w.data(), n, step, want.data());
    expect_floats(scale.data(), {step}, what + ", scale");
    expect_same_values(y.data(), want, what);
    return 2;
  }
  const float largest = largest_of<T>(w.data(), n), top = tanh_near(largest), levels = float((1 << bits) - 1);
  DorefaGrid grid{dorefa_half(top), levels, 0.f};
  float adjustment = 1.f;
  if (adjusted) {
    const float first = to_float(w.data()[0]), level = dorefa_level(tanh_near(first), grid.half, levels, 0.f);
    double sums[4];
    for (int s = 0; s < 4; ++s)
      sums[s] = total([&](const T* x, int64_t count, int64_t) {
        const DorefaPart part = s < 2 ? spread_run<T>(x, count, first) : spread_of_levels_run<T>(x, count, grid, level);
        return s % 2 ? part.square : part.sum;
      });
    adjustment = dorefa_adjustment({sums[0], sums[1]}, {sums[2], sums[3]}, n, levels);
  }
  if (largest != largest) adjustment = largest;
  grid.step = adjustment / levels;
  quantize_by_tanh<T>(w.data(), n, grid, want.data());
  expect_floats(stats.data(), {largest, top, adjustment}, what + ", stats");
  expect_floats(scale.data(), {grid.step}, what + ", scale");
  expect_same_values(y.data(), want, what);

  launch_dorefa_backward(static_cast<const T*>(grad.data()), static_cast<const T*>(w.data()), n, static_cast<const float*>(stats.data()),
                         out.data(), launch);
  const auto product = [&](bool counts) {
    return total([&](const T* x, int64_t count, int64_t p) {
      const DorefaProducts part = products_run<T>(grad.data() + p * dorefa_piece, x, count, largest);
      return counts ? part.count : part.product;
    });
  };
  dorefa_backward_run<T>(grad.data(), w.data(), n, dorefa_slope({largest, top, adjustment}, product(false), product(true)),
                         want_out.data());
  expect_same_values(out.data(), want_out, what + ", gradient");
  return 4;
}

template <typename T>
int64_t check_gradient(int64_t samples, int64_t elements, Pattern pattern, int bits) {
  const int64_t n = samples * elements;
  const Buffer<T> g(n, 0), y(n, 0);
  fill(g, pattern);
  simt::Launcher launch(1);
  const Seed seed{7, 9};
  launch_gradient(static_cast<const T*>(g.data()), n, elements, bits, seed, y.data(), launch);
  const float levels = float((1 << bits) - 1);
  std::vector<GradientGrid> grids(samples);
  for (int64_t s = 0; s < samples; ++s) grids[s] = gradient_grid(largest_of<T>(g.data() + s * elements, elements), levels);
  std::vector<T> want(n);
  quantize_gradient_run<T>(seed, g.data(), 0, n, elements, grids.data(), levels, want.data());
  expect_same_values(y.data(), want, named("dorefa_gradient", n, pattern));
  return 1;
}

template <typename T>
int64_t check() {
  int64_t count = check_dorefa<T>(40000, Pattern::noise, 2, true) + check_gradient<T>(1, 9000, Pattern::noise, 16);
  for (Pattern pattern : kPatterns) {
    for (int64_t n : {1, 31, 5000})
      for (int bits : {1, 2, 8}) count += check_dorefa<T>(n, pattern, bits, bits == 2);
    for (int bits : {2, 16}) count += check_gradient<T>(3, 257, pattern, bits) + check_gradient<T>(40, 3, pattern, bits);
  }
  return count;
}

}  // namespace

int64_t check_weight_dorefa() { return check<F32>() + check<BF16>() + check<F16>(); }

}  // namespace cuda_on_host
