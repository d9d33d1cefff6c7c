// max_pool: planes and rows of pixels against the definition, one window after the other.
#include "layers/max_pool_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::layers::MaxPoolKernels;
using quantize::layers::PoolShape;

const MaxPoolKernels& kernels(Isa isa, int scalar) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return quantize::layers::max_pool_avx512[scalar];
  if (isa == Isa::avx2) return quantize::layers::max_pool_avx2[scalar];
#endif
  return quantize::layers::max_pool_portable[scalar];
}

// Zeros may have either sign.
template <typename T>
void expect_alike(const Buffer<T>& got, const Buffer<T>& want, const std::string& what) {
  for (size_t i = 0; i < got.bytes() / sizeof(T); ++i)
    if (to_float(got[i]) != to_float(want[i]) && !(is_nan(got[i]) && is_nan(want[i]))) fail(what);
}

struct Case {
  int64_t input[2], kernel[2], stride[2], padding[2], dilation[2];
};
constexpr Case kCases[] = {
    {{7, 9}, {3, 3}, {2, 2}, {1, 1}, {1, 1}},   {{4, 35}, {2, 2}, {2, 2}, {0, 0}, {1, 1}},  {{5, 64}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
    {{9, 40}, {2, 5}, {3, 3}, {1, 2}, {2, 1}},  {{1, 100}, {1, 3}, {1, 2}, {0, 1}, {1, 3}}, {{18, 17}, {16, 16}, {1, 5}, {8, 8}, {1, 1}},
    {{12, 33}, {2, 1}, {4, 7}, {0, 0}, {3, 1}},
};

template <typename T>
int64_t check(Isa isa, Fence fence) {
  const MaxPoolKernels& k = kernels(isa, int(T::scalar));
  int64_t count = 0;
  for (const Case& own : kCases) {
    PoolShape s;
    for (int d = 0; d < 2; ++d) {
      s.input[d] = own.input[d], s.kernel[d] = own.kernel[d], s.stride[d] = own.stride[d];
      s.padding[d] = own.padding[d], s.dilation[d] = own.dilation[d];
      s.output[d] = (own.input[d] + 2 * own.padding[d] - own.dilation[d] * (own.kernel[d] - 1) - 1) / own.stride[d] + 1;
    }
    const int64_t plane = s.input[0] * s.input[1], out = s.output[0] * s.output[1];
    for (int64_t channels : {1, 3, 16, 35}) {
      for (Pattern pattern : kPatterns) {
        const std::string what = std::to_string(plane) + " pixels, kernel " + std::to_string(s.kernel[0]) + ", stride " +
                                 std::to_string(s.stride[1]) + ", pattern " + kPatternNames[int(pattern)];
        Buffer<T> x(plane * channels, fence), row(s.output[1] * channels, fence), want(out * channels, fence);
        Buffer<uint8_t> offsets(s.output[1] * channels, fence), want_offsets(out * channels, fence);
        fill(x, pattern);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t o = 0; o < out; ++o) {
            T best{};
            int64_t found = -1;
            for (int64_t tap = 0; tap < s.kernel[0] * s.kernel[1]; ++tap) {
              const int64_t h = s.start(0, o / s.output[1]) + tap / s.kernel[1] * s.dilation[0],
                            w = s.start(1, o % s.output[1]) + tap % s.kernel[1] * s.dilation[1];
              if (h < 0 || h >= s.input[0] || w < 0 || w >= s.input[1]) continue;
              const T v = x[(h * s.input[1] + w) * channels + c];
              if (found < 0 || to_float(v) > to_float(best) || is_nan(v)) best = v, found = tap;
            }
            want[o * channels + c] = best, want_offsets[o * channels + c] = uint8_t(found);
          }
        for (int64_t place = 0; place < s.output[0]; ++place) {
          k.row(x.data(), channels, s, place, row.data(), offsets.data(), nullptr);
          Buffer<T> want_row(row.bytes() / sizeof(T), fence);
          Buffer<uint8_t> want_row_offsets(offsets.bytes(), fence);
          std::memcpy(static_cast<void*>(want_row.data()), want.data() + place * s.output[1] * channels, want_row.bytes());
          std::memcpy(want_row_offsets.data(), want_offsets.data() + place * s.output[1] * channels, want_row_offsets.bytes());
          expect_same(row, want_row, "pixels: " + what);
          expect_same(offsets, want_row_offsets, "pixels' offsets: " + what);
          Buffer<float> columns(s.row_scratch(channels) / int64_t(sizeof(float)), fence);
          k.row(x.data(), channels, s, place, row.data(), nullptr, columns.data());
          expect_alike(row, want_row, "pixels alone: " + what);
          count += 3;
        }
        if (channels > 1) continue;
        Buffer<T> y(out, fence);
        Buffer<uint8_t> y_offsets(out, fence);
        Buffer<float> scratch(s.scratch() / int64_t(sizeof(float)), fence);
        k.plane(x.data(), s, y.data(), y_offsets.data(), scratch.data());
        expect_same(y, want, "plane: " + what);
        expect_same(y_offsets, want_offsets, "plane's offsets: " + what);
        k.plane(x.data(), s, y.data(), nullptr, scratch.data());
        expect_alike(y, want, "plane alone: " + what);
        count += 3;
      }
    }
  }
  return count;
}

}  // namespace

int64_t check_max_pool(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
