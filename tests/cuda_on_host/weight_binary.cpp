// Binary and DoReFa weights, activations on fixed grids, rounded gradients: the CUDA kernels return the CPU's bits.
#include "weight/binary.cuh"
#include "weight/binary_run.h"
#include "weight/dorefa.cuh"
#include "weight/dorefa_run.h"
#include "weight/fixed_grid.cuh"
#include "weight/fixed_grid_run.h"

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
int64_t check_filters(int64_t rows, BinaryShape shape, Pattern pattern, double share, bool relative) {
  const int64_t n = shape.elements(), taps = shape.taps;
  const Buffer<T> w(rows * n, 0), grad(rows * n, 0), y(rows * n, 0), out(rows * n, 0);
  const Buffer<float> scale(rows, 0), mean(rows * taps, 0), limit(1, 0);
  fill(w, pattern), fill(grad, Pattern::noise);
  simt::Launcher launch(1);
  *limit.data() = float(share);
  launch_binary(static_cast<const T*>(w.data()), rows, shape, share, relative, y.data(), scale.data(), mean.data(), limit.data(), launch);
  launch_binary_backward(static_cast<const T*>(grad.data()), static_cast<const T*>(w.data()), rows, shape,
                         static_cast<const float*>(scale.data()), static_cast<const float*>(mean.data()),
                         static_cast<const float*>(limit.data()), 2.5f, out.data(), launch);
  std::vector<T> want(rows * n), want_out(rows * n);
  std::vector<float> want_scale(rows), want_mean(rows * taps), tile(16 * taps), sums(16 * taps), bound(1, float(share));
  double part[binary_sums] = {};
  for (int64_t r = 0; r < rows; ++r) {
    centre_row<T>(w.data() + r * n, shape, &want_mean[r * taps], tile.data());
    if (relative) part[r % binary_sums] += magnitude_of_row<T>(w.data() + r * n, shape, &want_mean[r * taps], INFINITY, tile.data());
  }
  if (relative) bound[0] = binary_limit(join_parts(part), rows * n, share);
  for (int64_t r = 0; r < rows; ++r) {
    want_scale[r] = magnitude_of_row<T>(w.data() + r * n, shape, &want_mean[r * taps], bound[0], tile.data()) / float(n);
    write_row<T>(w.data() + r * n, shape, &want_mean[r * taps], want_scale[r], tile.data(), want.data() + r * n);
    binary_row_backward<T>(grad.data() + r * n, w.data() + r * n, shape, &want_mean[r * taps], want_scale[r], bound[0], 2.5f, tile.data(),
                           sums.data(), want_out.data() + r * n);
  }
  const std::string what = named("binary", n, pattern);
  expect_floats(mean.data(), want_mean, what + ", mean");
  expect_floats(limit.data(), bound, what + ", limit");
  expect_floats(scale.data(), want_scale, what + ", scale");
  expect_same_values(y.data(), want, what);
  expect_same_values(out.data(), want_out, what + ", gradient");
  return 5;
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
int64_t check_activations(int64_t n, Pattern pattern) {
  const Buffer<T> x(n, 0), grad(n, 0), y(n, 0), out(n, 0);
  fill(x, pattern), fill(grad, Pattern::noise);
  simt::Launcher launch(1);
  std::vector<T> want(n), want_out(n);
  for (int kind : {0, 1, 2, 3}) {  // sign, with slopes, and fractions of two kinds
    const bool polynomial = kind == 1;
    const int levels = kind == 2 ? 1 : 255;
    const Buffer<uint8_t> kept(slope_bytes(n, polynomial), 0);
    std::vector<uint8_t> want_kept(slope_bytes(n, polynomial));
    const T* source = x.data();
    if (kind < 2) {
      launch_sign(source, n, polynomial, y.data(), kept.data(), launch);
      (polynomial ? sign_polynomial_run<T> : sign_run<T>)(source, n, want.data(), want_kept.data());
    } else {
      launch_unit(source, n, levels, y.data(), kept.data(), launch);
      unit_run<T>(source, n, unit_range(levels), want.data(), want_kept.data());
    }
    const std::string what = named("fixed_grid", n, pattern) + ", kind " + std::to_string(kind);
    expect_same_values(y.data(), want, what);
    expect_same(kept.data(), want_kept, what + ", kept");
    launch_grid_gradients(static_cast<const T*>(grad.data()), static_cast<const uint8_t*>(kept.data()), n, polynomial, out.data(), launch);
    (polynomial ? slope_run<T> : pass_run<T>)(grad.data(), want_kept.data(), n, want_out.data());
    expect_same_values(out.data(), want_out, what + ", gradient");
  }
  return 12;
}

template <typename T>
int64_t check() {
  int64_t count = 0;
  for (Pattern pattern : kPatterns) {
    for (const BinaryShape& shape : {BinaryShape{1, 1, false}, {9, 1, false}, {7, 1, true}, {16, 9, true}, {33, 4, true}, {257, 1, true}})
      for (int64_t rows : {1, 3, 17}) {
        count += check_filters<T>(rows, shape, pattern, 1., false);
        count += check_filters<T>(rows, shape, pattern, 3.912, true);
      }
    for (int64_t n : {1, 31, 2048, 5000, 40000})
      for (int bits : {1, 2, 3, 8, 16}) {
        if (n == 40000 && bits > 2) continue;
        count += check_dorefa<T>(n, pattern, bits, false) + check_dorefa<T>(n, pattern, bits, true);
      }
    for (int bits : {2, 8, 16})
      count +=
          check_gradient<T>(1, 9000, pattern, bits) + check_gradient<T>(3, 257, pattern, bits) + check_gradient<T>(40, 3, pattern, bits);
    for (int64_t n : {1, 2, 7, 31, 32, 33, 1000, 8193}) count += check_activations<T>(n, pattern);
  }
  return count;
}

}  // namespace

int64_t check_weight_binary() { return check<F32>() + check<BF16>() + check<F16>(); }

}  // namespace cuda_on_host
