// The batch norm's kernels: sums and values of every ISA are the portable ones, bit for bit.
#include "layers/batch_norm_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::layers::batch_norm_kernels;
using quantize::layers::ChannelRun;

template <typename T>
int64_t check(Isa isa, Fence fence) {
  int64_t count = 0;
  // inner, width: planes of several sizes, rows that are and are not whole vectors; runs that begin and end inside of one.
  const int64_t shapes[][2] = {{1024, 2}, {49, 21}, {5, 200}, {1, 1000}, {0, 64}, {0, 66}, {0, 300}};
  for (const auto& [inner, width] : shapes) {
    for (const auto& [first, length] : {std::pair<int64_t, int64_t>{0, 1000}, {0, 1}, {37, 600}, {70, 300}, {3, 5}}) {
      const ChannelRun run{first, length, inner, width};
      Buffer<T> x(length, fence), grad(length, fence);
      for (Pattern pattern : kPatterns) {
        fill(x, pattern), fill(grad, Pattern::noise);
        Buffer<float> offset(width + 16, fence), slope(width + 16, fence), gain(width + 16, fence);
        for (auto* t : {&offset, &slope, &gain})
          for (int64_t i = 0; i < width + 16; ++i) (*t)[i] = float(i % 7) - 2.5f;
        for (const bool squares : {false, true}) {
          Buffer<float> got(3 * run.slots(), fence), want(3 * run.slots(), fence);
          for (auto [kernels, sums] :
               {std::pair{&batch_norm_kernels(isa, T::scalar), &got}, {&batch_norm_kernels(Isa::portable, T::scalar), &want}}) {
            for (int64_t i = 0; i < 3 * run.slots(); ++i) (*sums)[i] = 0.f;
            float* s = sums->data();
            kernels->reduce(x.data(), grad.data(), run, {s, s + run.slots(), squares ? s + 2 * run.slots() : nullptr});
          }
          expect_same(got, want,
                      "batch_norm reduce: inner " + std::to_string(inner) + ", width " + std::to_string(width) + ", first " +
                          std::to_string(first) + ", " + kPatternNames[int(pattern)]);
        }
        const quantize::layers::ChannelTerms terms{offset.data(), slope.data(), gain.data()};
        const std::string what = ": inner " + std::to_string(inner) + ", width " + std::to_string(width) + ", first " +
                                 std::to_string(first) + ", " + kPatternNames[int(pattern)];
        Buffer<T> got(length, fence), want(length, fence);
        const auto &own = batch_norm_kernels(isa, T::scalar), &portable = batch_norm_kernels(Isa::portable, T::scalar);
        own.apply(x.data(), grad.data(), run, terms, got.data());
        portable.apply(x.data(), grad.data(), run, terms, want.data());
        expect_same(got, want, "batch_norm apply" + what);
        own.normalize(x.data(), run, terms, got.data());
        portable.normalize(x.data(), run, terms, want.data());
        expect_same(got, want, "batch_norm normalize" + what);
        own.scale(x.data(), run, terms, got.data());
        portable.scale(x.data(), run, terms, want.data());
        expect_same(got, want, "batch_norm scale" + what);
        own.scale(x.data(), run, terms, x.data());
        expect_same(x, want, "batch_norm scale in place" + what);
        count += 6;
      }
    }
  }
  return count;
}

}  // namespace

int64_t check_batch_norm(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
