// diffq: ranges, noise, grids, bits and the gradients' sums of every ISA are the portable ones, bit for bit.
#include <algorithm>
#include <vector>

#include "harness.h"
#include "weight/diffq_kernels.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::Scalar;
using namespace quantize::weight;

constexpr int64_t piece = DiffQTraits::piece;
constexpr BitsBounds kBounds[] = {{2.f, 13.f, 2.f, 15.f}, {1.f, 15.f, 1.f, 16.f}, {2.5f, 1.75f, 3.f, 4.f}, {3.f, 0.f, 3.f, 3.f}};

int64_t count_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

const float* quantiles() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) values[i] = (float(i) - 32767.5f) * 2e-5f;
    return values;
  }();
  return table.data();
}

void fill_logits(const Buffer<float>& logits) {
  const float odd[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -1e30f, 60.f, -60.f, 0.f};
  for (size_t i = 0; i < logits.bytes() / sizeof(float); ++i)
    logits[i] = i % 23 < 6 ? odd[i % 23] : float(int32_t(quantize::hash32(uint32_t(i) + 9))) * 0x1p-28f;
}

// What the kernels make of one tensor.
template <typename T>
struct Made {
  Made(int64_t n, int64_t groups, int64_t rows, Fence fence)
      : ranges(2 * rows, fence),
        extremes(2 * rows, fence),
        y(n, fence),
        rounded(n, fence),
        logits(groups, fence),
        rows(rows, fence),
        cut_groups(2 * count_of(n, piece), fence),
        cut_rows(2 * count_of(n, piece), fence) {}

  void run(const DiffQKernels& k, DiffQTensor t, const Buffer<T>& w, const Buffer<T>& grad) {
    t.ranges = ranges.data();
    for (int64_t row = 0; row < count_of(t.n, t.span); ++row) {
      const DiffQExtent own = k.extent(w.data() + row * t.span, std::min(t.span, t.n - row * t.span));
      ranges[2 * row] = own.low, ranges[2 * row + 1] = own.range;
      extremes[2 * row] = own.lowest, extremes[2 * row + 1] = own.highest;
    }
    const int64_t middle = t.n / 3;  // stretches begin anywhere
    k.noise(t, w.data(), 0, middle, y.data()), k.noise(t, w.data(), middle, t.n, y.data());
    k.round(t, w.data(), 0, middle, rounded.data()), k.round(t, w.data(), middle, t.n, rounded.data());
    for (int64_t p = 0; p < count_of(t.n, piece); ++p)
      k.backward(t, grad.data(), p, {logits.data(), rows.data(), cut_groups.data() + 2 * p, cut_rows.data() + 2 * p});
  }

  Buffer<float> ranges;
  Buffer<int32_t> extremes;
  Buffer<T> y, rounded;
  Buffer<float> logits, rows, cut_groups, cut_rows;
};

template <typename T>
int64_t check_tensors(Isa isa, Fence fence) {
  const auto &k = diffq_kernels(isa, T::scalar), &portable = diffq_kernels(Isa::portable, T::scalar);
  int64_t count = 0;
  for (int64_t n : {1, 7, 27, 129, 257, 1000, 2049, 4100}) {
    Buffer<T> w(n, fence), grad(n, fence);
    fill(grad, Pattern::noise);
    for (int64_t group_size : {int64_t(1), int64_t(3), int64_t(4), int64_t(8), int64_t(16), int64_t(17), n})
      for (int64_t span : {n, std::min<int64_t>(n, 27), group_size}) {
        if (group_size > n) continue;
        const int64_t groups = count_of(n, group_size), rows = count_of(n, span);
        Buffer<float> logits(groups, fence);
        fill_logits(logits);
        Made<T> got(n, groups, rows, fence), want(n, groups, rows, fence);
        for (Pattern pattern : kPatterns) {
          fill(w, pattern);
          const DiffQTensor t{n,
                              group_size,
                              span,
                              logits.data(),
                              nullptr,
                              kBounds[count % 4],
                              {0x123456789abcdefull, 77},
                              uint32_t(count),
                              count % 3 ? nullptr : quantiles()};
          got.run(k, t, w, grad), want.run(portable, t, w, grad);
          const std::string what = "n " + std::to_string(n) + ", groups of " + std::to_string(group_size) + ", ranges of " +
                                   std::to_string(span) + ", pattern " + kPatternNames[int(pattern)];
          expect_same(got.ranges, want.ranges, "diffq's ranges: " + what);
          expect_same(got.extremes, want.extremes, "diffq's extremes: " + what);
          expect_same(got.y, want.y, "diffq's noise: " + what);
          expect_same(got.rounded, want.rounded, "diffq's grid: " + what);
          expect_same(got.logits, want.logits, "diffq's logits: " + what);
          expect_same(got.rows, want.rows, "diffq's ranges' gradient: " + what);
          expect_same(got.cut_groups, want.cut_groups, "diffq's cut groups: " + what);
          expect_same(got.cut_rows, want.cut_rows, "diffq's cut rows: " + what);
          count += 8;
        }
      }
  }
  return count;
}

template <typename T>
int64_t check_clipped(Isa isa, Fence fence) {
  const auto &k = diffq_kernels(isa, T::scalar), &portable = diffq_kernels(Isa::portable, T::scalar);
  int64_t count = 0;
  for (int64_t n : {1, 15, 17, 300, 2049, 4100}) {
    Buffer<T> x(n, fence), grad(n, fence), got(n, fence), want(n, fence);
    fill(grad, Pattern::noise);
    for (Pattern pattern : kPatterns) {
      fill(x, pattern);
      const ClippedNoise noise{-0.5f, 0.75f, 0.1f, {5, 6}};
      const std::string what = "n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)];
      const int64_t middle = n / 3;
      k.clipped(noise, x.data(), 0, middle, got.data()), k.clipped(noise, x.data(), middle, n, got.data());
      portable.clipped(noise, x.data(), 0, n, want.data());
      expect_same(got, want, "clipped noise: " + what);
      for (int64_t p = 0; p < count_of(n, piece); ++p) {
        Buffer<float> sums(3, fence), want_sums(3, fence);
        const ClippedSums a = k.clipped_backward(noise, grad.data(), x.data(), n, p, got.data()),
                          b = portable.clipped_backward(noise, grad.data(), x.data(), n, p, want.data());
        sums[0] = a.noise, sums[1] = a.above, sums[2] = a.below;
        want_sums[0] = b.noise, want_sums[1] = b.above, want_sums[2] = b.below;
        expect_same(sums, want_sums, "clipped noise's sums: " + what);
      }
      expect_same(got, want, "clipped noise's gradient: " + what);
      count += 3;
    }
  }
  return count;
}

int64_t check_bits(Isa isa, Fence fence) {
  const auto &k = diffq_kernels(isa, Scalar::f32), &portable = diffq_kernels(Isa::portable, Scalar::f32);
  int64_t count = 0;
  for (int64_t n : {1, 15, 16, 17, 63, 65, 129, 1000, 2047, 2049, 5000}) {
    Buffer<float> logits(n, fence), bits(n, fence), slope(n, fence), want(n, fence), want_slope(n, fence);
    fill_logits(logits);
    for (const BitsBounds& bounds : kBounds)
      for (bool rounded : {false, true}) {
        const double sum = k.bits(logits.data(), n, bounds, rounded, bits.data(), slope.data(), 0.5f),
                     want_sum = portable.bits(logits.data(), n, bounds, rounded, want.data(), want_slope.data(), 0.5f);
        const std::string what = "diffq's bits: n " + std::to_string(n);
        expect_same(bits, want, what);
        expect_same(slope, want_slope, what + ", slope");
        if (sum != want_sum || k.bits(logits.data(), n, bounds, rounded, nullptr, nullptr, 1.f) != sum) fail(what + ", sum");
        count += 3;
      }
  }
  return count;
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  return check_tensors<T>(isa, fence) + check_clipped<T>(isa, fence);
}

}  // namespace

int64_t check_diffq(Isa isa, Fence fence) {
  return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence) + check_bits(isa, fence);
}

}  // namespace sanitize
