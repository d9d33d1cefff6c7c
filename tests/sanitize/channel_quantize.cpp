// channel_quantize: levels, scales and clipped gradients of every ISA are the portable ones, bit for bit.
#include "weight/channel_quantize_kernels.h"

#include <cmath>

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::weight::channel_quantize_kernels;
using quantize::weight::ChannelScale;
using quantize::weight::Codebook;

// As codebook.h makes them, which needs torch.
Codebook book_of(bool power_of_two, int bits, bool least_squares) {
  Codebook book{};
  book.power_of_two = power_of_two;
  book.least_squares = least_squares;
  book.anchor = power_of_two ? 1.f : float((1 << (bits - 1)) - 1);
  book.lowest = book.unit = power_of_two ? float(std::exp2(-std::min((1 << (bits - 1)) - 2, 62))) : 1.f;
  book.carry = 0x400000u - 1;
  book.edge = power_of_two ? 1.5f : (book.anchor + 0.5f) / book.anchor;
  book.candidates = least_squares ? Codebook::max_candidates : 1;
  for (int c = 0; c < book.candidates; ++c) book.ratio[c] = float(std::exp2((power_of_two && least_squares ? 1 - c : -c) / 8.));
  return book;
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  const auto &k = channel_quantize_kernels(isa, T::scalar), &portable = channel_quantize_kernels(Isa::portable, T::scalar);
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> w(n, fence), y(n, fence), want(n, fence);
    Buffer<float> scale(4, fence), want_scale(4, fence);
    for (Pattern pattern : kPatterns) {
      fill(w, pattern);
      for (const bool power_of_two : {false, true})
        for (const int bits : {2, 4, 8})
          for (const bool least_squares : {false, true}) {
            const Codebook book = book_of(power_of_two, bits, least_squares);
            const std::string what = "n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)] + ", " + std::to_string(bits) +
                                     (power_of_two ? " bits, powers of two" : " bits, uniform");
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
