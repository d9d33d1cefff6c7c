// Binary and DoReFa weights, activations on fixed grids, rounded gradients: every ISA's results are the portable ones, bit for bit.
#include "weight/binary_kernels.h"
#include "weight/dorefa_kernels.h"
#include "weight/fixed_grid_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::weight;
using quantize::Isa;
using quantize::Seed;

template <typename T>
int64_t check_filter(Isa isa, Fence fence, BinaryShape shape, Pattern pattern, float limit) {
  const auto &k = binary_kernels(isa, T::scalar), &portable = binary_kernels(Isa::portable, T::scalar);
  const int64_t n = shape.elements(), taps = shape.taps;
  Buffer<T> w(n, fence), grad(n, fence), y(n, fence), want(n, fence);
  Buffer<float> mean(taps, fence), want_mean(taps, fence), tile(16 * taps, fence), sums(16 * taps, fence), scale(1, fence),
      want_scale(1, fence);
  fill(w, pattern), fill(grad, Pattern::noise);
  const std::string what =
      "binary: " + std::to_string(shape.channels) + " channels, " + std::to_string(taps) + " taps, pattern " + kPatternNames[int(pattern)];
  portable.centre(w.data(), shape, want_mean.data(), tile.data());
  k.centre(w.data(), shape, mean.data(), tile.data());
  expect_same(mean, want_mean, what + ", mean");
  want_scale[0] = portable.magnitude(w.data(), shape, mean.data(), limit, tile.data()) / float(n);
  scale[0] = k.magnitude(w.data(), shape, mean.data(), limit, tile.data()) / float(n);
  expect_same(scale, want_scale, what + ", scale");
  portable.write(w.data(), shape, mean.data(), scale[0], tile.data(), want.data());
  k.write(w.data(), shape, mean.data(), scale[0], tile.data(), y.data());
  expect_same(y, want, what);
  portable.backward(grad.data(), w.data(), shape, mean.data(), scale[0], limit, 2.5f, tile.data(), sums.data(), want.data());
  k.backward(grad.data(), w.data(), shape, mean.data(), scale[0], limit, 2.5f, tile.data(), sums.data(), y.data());
  expect_same(y, want, what + ", gradient");
  return 4;
}

void expect_part(DorefaPart got, DorefaPart want, const std::string& what) {
  Buffer<float> a(2, Fence::heap), b(2, Fence::heap);
  a[0] = got.sum, a[1] = got.square, b[0] = want.sum, b[1] = want.square;
  expect_same(a, b, what);
}

template <typename T>
int64_t check_dorefa(Isa isa, Fence fence, int64_t n, Pattern pattern) {
  const auto &k = dorefa_kernels(isa, T::scalar), &portable = dorefa_kernels(Isa::portable, T::scalar);
  Buffer<T> w(n, fence), grad(n, fence), y(n, fence), want(n, fence);
  fill(w, pattern), fill(grad, Pattern::noise);
  const std::string what = "dorefa: n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)];
  const float largest = portable.largest(w.data(), n), first = to_float(w[0]);
  expect_part({k.largest(w.data(), n), k.magnitudes(w.data(), n)}, {largest, portable.magnitudes(w.data(), n)}, what + ", magnitudes");
  expect_part(k.spread(w.data(), n, first), portable.spread(w.data(), n, first), what + ", spread");
  const DorefaProducts got = k.products(grad.data(), w.data(), n, largest), expected = portable.products(grad.data(), w.data(), n, largest);
  expect_part({got.product, got.count}, {expected.product, expected.count}, what + ", products");
  portable.sign(w.data(), n, 0.25f, want.data());
  k.sign(w.data(), n, 0.25f, y.data());
  expect_same(y, want, what + ", sign");
  const DorefaSlope slope = dorefa_slope({largest, tanh_near(largest), 1.5f}, expected.product, expected.count);
  portable.backward(grad.data(), w.data(), n, slope, want.data());
  k.backward(grad.data(), w.data(), n, slope, y.data());
  expect_same(y, want, what + ", gradient");
  int64_t count = 5;
  for (int bits : {2, 8, 16}) {
    const float levels = float((1 << bits) - 1);
    const DorefaGrid grid{dorefa_half(tanh_near(largest)), levels, 1.f / levels};
    portable.quantize(w.data(), n, grid, want.data());
    k.quantize(w.data(), n, grid, y.data());
    expect_same(y, want, what + ", quantized");
    expect_part(k.spread_of_levels(w.data(), n, grid, levels), portable.spread_of_levels(w.data(), n, grid, levels), what + ", levels");
    for (int64_t elements : {n, int64_t(7)}) {
      if (n % elements) continue;
      Buffer<GradientGrid> grids(n / elements, fence);
      for (int64_t s = 0; s < n / elements; ++s) grids[s] = gradient_grid(portable.largest(&w[s * elements], elements), levels);
      portable.gradient(Seed{1, 2}, w.data(), 0, n, elements, grids.data(), levels, want.data());
      k.gradient(Seed{1, 2}, w.data(), 0, n / 2, elements, grids.data(), levels, y.data());
      k.gradient(Seed{1, 2}, w.data(), n / 2, n, elements, grids.data(), levels, y.data());
      expect_same(y, want, what + ", rounded");
      ++count;
    }
    count += 2;
  }
  return count;
}

template <typename T>
int64_t check_activations(Isa isa, Fence fence, int64_t n, Pattern pattern) {
  const auto &k = fixed_grid_kernels(isa, T::scalar), &portable = fixed_grid_kernels(Isa::portable, T::scalar);
  Buffer<T> x(n, fence), y(n, fence), want(n, fence);
  fill(x, pattern);
  const std::string what = "fixed_grid: n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)];
  for (int kind : {0, 1, 2}) {
    Buffer<uint8_t> kept(slope_bytes(n, kind == 1), fence), want_kept(slope_bytes(n, kind == 1), fence);
    const auto run = [&](const FixedGridKernels& kernels, void* target, uint8_t* bits) {
      if (kind == 2) return kernels.unit(x.data(), n, unit_range(15), target, bits);
      (kind ? kernels.sign_polynomial : kernels.sign)(x.data(), n, target, bits);
    };
    run(portable, want.data(), want_kept.data());
    run(k, y.data(), kept.data());
    expect_same(y, want, what);
    expect_same(kept, want_kept, what + ", kept");
    (kind == 1 ? portable.slope : portable.pass)(x.data(), kept.data(), n, want.data());
    (kind == 1 ? k.slope : k.pass)(x.data(), kept.data(), n, y.data());
    expect_same(y, want, what + ", gradient");
  }
  return 9;
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  int64_t count = 0;
  for (Pattern pattern : kPatterns) {
    for (const BinaryShape& shape :
         {BinaryShape{1, 1, false}, {257, 1, false}, {2, 1, true}, {7, 9, true}, {64, 9, true}, {33, 25, true}, {300, 1, true}})
      for (float limit : {1.f, 0.25f, std::numeric_limits<float>::infinity()}) count += check_filter<T>(isa, fence, shape, pattern, limit);
    for (int64_t n : kSizes) count += check_dorefa<T>(isa, fence, n, pattern) + check_activations<T>(isa, fence, n, pattern);
    count += check_dorefa<T>(isa, fence, 5600, pattern);
  }
  return count;
}

}  // namespace

int64_t check_weight_binary(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
