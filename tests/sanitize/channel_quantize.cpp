// channel_quantize: levels, scales and clipped gradients of every ISA are the portable ones, bit for bit.
#include "weight/channel_quantize_kernels.h"

#include <tuple>

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::weight::channel_quantize_kernels;
using quantize::weight::ChannelScale;
using quantize::weight::Codebook;
using quantize::weight::make_codebook;
using quantize::weight::make_ternary_codebook;

template <typename T>
int64_t check(Isa isa, Fence fence) {
  const auto &k = channel_quantize_kernels(isa, T::scalar), &portable = channel_quantize_kernels(Isa::portable, T::scalar);
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> w(n, fence), y(n, fence), want(n, fence);
    Buffer<float> scale(4, fence), want_scale(4, fence);
    for (Pattern pattern : kPatterns) {
      fill(w, pattern);
      for (const auto& [power_of_two, plus, name] :
           {std::tuple{false, false, "uniform"}, {true, false, "po2"}, {true, true, "po2plus"}, {false, true, "ternary"}})
        for (const int bits : {2, 4, 8})
          for (const bool least_squares : {false, true}) {
            const bool is_ternary = plus && !power_of_two;
            const Codebook book = is_ternary ? make_ternary_codebook() : make_codebook(power_of_two, plus, bits, least_squares);
            const std::string what =
                "n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)] + ", " + std::to_string(bits) + " bits, " + name;
            const ChannelScale expected = portable.quantize(w.data(), n, book, want.data()), own = k.quantize(w.data(), n, book, y.data());
            expect_same(y, want, "channel_quantize: " + what);
            want_scale[0] = expected.inverse, want_scale[1] = expected.step, want_scale[2] = expected.scale, want_scale[3] = expected.limit;
            scale[0] = own.inverse, scale[1] = own.step, scale[2] = own.scale, scale[3] = own.limit;
            expect_same(scale, want_scale, "channel_quantize's scale: " + what);

            portable.clip(want.data(), w.data(), n, expected.limit, want.data());  // in place: any gradient will do
            k.clip(y.data(), w.data(), n, own.limit, y.data());
            expect_same(y, want, "clip_gradient: " + what);
            count += 3;
          }
    }
  }
  return count;
}

}  // namespace

int64_t check_channel_quantize(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
