// Binary weights and activations on fixed grids: the CUDA kernels return the CPU's bits.
#include "weight/binary.cuh"
#include "weight/binary_run.h"
#include "weight/fixed_grid.cuh"
#include "weight/fixed_grid_run.h"

#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::weight;

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
    for (const BinaryShape& shape : {BinaryShape{9, 1, false}, {7, 1, true}, {16, 9, true}, {33, 4, true}, {257, 1, true}})
      for (int64_t rows : {1, 17})
        count += check_filters<T>(rows, shape, pattern, 1., false) + check_filters<T>(rows, shape, pattern, 3.912, true);
    for (int64_t n : {1, 2, 7, 31, 33, 1000, 8193}) count += check_activations<T>(n, pattern);
  }
  return count;
}

}  // namespace

int64_t check_weight_binary() { return check<F32>() + check<BF16>() + check<F16>(); }

}  // namespace cuda_on_host
