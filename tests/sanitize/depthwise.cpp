// Depthwise convolutions of planes and of pixels against the definition, to the bit.
#include "packed/depthwise_kernels.h"

#include <vector>

#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

constexpr int64_t lanes = DepthwiseTraits::lanes;

const DepthwiseKernels& kernels(Isa isa) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return depthwise_avx512;
  if (isa == Isa::avx2) return depthwise_avx2;
#endif
  return depthwise_portable;
}

struct Case {
  int64_t input[2], kernel[2], stride[2], padding[2], dilation[2];
};
constexpr Case kCases[] = {
    {{7, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},   {{8, 35}, {3, 3}, {2, 2}, {1, 1}, {1, 1}},  {{5, 64}, {5, 5}, {2, 2}, {2, 2}, {1, 1}},
    {{9, 40}, {2, 5}, {3, 3}, {1, 2}, {2, 1}},  {{1, 100}, {1, 3}, {1, 2}, {0, 0}, {1, 3}}, {{3, 17}, {3, 3}, {1, 1}, {20, 20}, {9, 9}},
    {{12, 33}, {2, 1}, {4, 7}, {0, 0}, {3, 1}}, {{4, 31}, {3, 3}, {2, 2}, {0, 0}, {1, 1}},  {{2, 2}, {1, 1}, {9, 9}, {0, 0}, {1, 1}},
};

float level(F32 x, LsqRange range) {
  using namespace quantize::weight;
  return x.value != x.value ? range.low : lsq_clip(lsq_round(lsq_divide(x.value, range)), range);
}

int64_t check(Isa isa, Fence fence, const Case& own, int64_t rows) {
  const DepthwiseKernels& k = kernels(isa);
  int64_t out[2], count = 0;
  for (int d = 0; d < 2; ++d) out[d] = (own.input[d] + 2 * own.padding[d] - own.dilation[d] * (own.kernel[d] - 1) - 1) / own.stride[d] + 1;
  rows = std::min(rows, out[0]);
  const Units u(own.input, out, own.kernel, own.stride, own.padding, own.dilation, rows);
  const int64_t height = own.input[0], width = own.input[1], taps = own.kernel[0] * own.kernel[1];
  const auto range = quantize::weight::lsq_range(0.07f, 11.f, 255);
  const Buffer<int64_t> offsets(taps, fence), pixel_offsets(taps, fence);
  for (int64_t t = 0; t < taps; ++t) offsets[t] = u.at(t / own.kernel[1] * own.dilation[0], t % own.kernel[1] * own.dilation[1]);
  const Buffer<float> weights(taps * lanes, fence), plane_weights(taps * lanes, fence), gain(lanes, fence), bias(lanes, fence);
  for (int64_t i = 0; i < taps * lanes; ++i) {
    weights[i] = float(int(quantize::hash32(uint32_t(i)) % 255) - 127);
    plane_weights[i] = weights[i / lanes * lanes];
  }
  for (int64_t l = 0; l < lanes; ++l) gain[l] = 0.01f, bias[l] = 3.7f;
  const auto weight = [&](int64_t t, int64_t c) { return weights[t * lanes + c]; };
  for (int64_t channels : {1, 16, 21})
    for (int64_t first = 0; first < out[0]; first += rows)
      for (Pattern pattern : kPatterns) {
        Buffer<F32> x(height * width * channels, fence);
        fill(x, pattern);
        const auto* values = reinterpret_cast<const float*>(x.data());
        const int64_t many = std::min(rows, out[0] - first);
        const auto expected = [&](int64_t o, int64_t c, int64_t lane) {
          double sum = 0;
          for (int64_t t = 0; t < taps; ++t) {
            const int64_t y = (first + o / out[1]) * own.stride[0] - own.padding[0] + t / own.kernel[1] * own.dilation[0],
                          z = o % out[1] * own.stride[1] - own.padding[1] + t % own.kernel[1] * own.dilation[1];
            if (y >= 0 && y < height && z >= 0 && z < width)
              sum += double(level(x[(y * width + z) * channels + c], range)) * weight(t, lane);
          }
          return float(sum) * 0.01f + 3.7f;
        };
        const std::string what = std::to_string(height) + " x " + std::to_string(width) + ", " + std::to_string(taps) + " taps, channels " +
                                 std::to_string(channels) + ", from row " + std::to_string(first) + ", " + kPatternNames[int(pattern)];
        if (channels == 1) {
          const int64_t vectors = ((many - 1) * u.pitch() + out[1] + lanes - 1) / lanes;
          const Buffer<float> levels(u.count(), fence), line(u.extent[1] + lanes, fence), sums((vectors + 1) * lanes, fence);
          const Buffer<float> got(many * out[1], fence), want(many * out[1], fence);
          k.fill_plane(values, u, first, range, levels.data(), line.data());
          k.sum(levels.data(), vectors, offsets.data(), taps, plane_weights.data(), lanes, gain.data(), bias.data(), sums.data(), lanes,
                lanes);
          k.copy_rows(sums.data(), u.pitch(), many, out[1], got.data());
          for (int64_t o = 0; o < many * out[1]; ++o) want[o] = expected(o, 0, 0);
          expect_same(got, want, "depthwise, plane: " + what);
        } else {
          // All rows of the block, one behind the other; two chunks of the last channels, of which the second is compared.
          const int64_t start = channels == 21 ? 3 : 0, count = channels - start, last = (count - 1) / lanes * lanes, used = count - last;
          const int64_t row = (count + lanes - 1) / lanes * u.chunk(), top = first * own.stride[0] - own.padding[0];
          const Buffer<float> levels(u.extent[0] * row, fence), got(many * out[1] * used, fence), want(many * out[1] * used, fence);
          for (int64_t r = 0; r < u.extent[0]; ++r) {
            const bool inside = top + r >= 0 && top + r < height;
            const float* pixels = inside ? values + (top + r) * width * channels + start : nullptr;
            k.fill_row(pixels, values + height * width * channels, channels, count, u, range, levels.data() + r * row);
          }
          for (int64_t h = 0; h < many; ++h) {
            for (int64_t t = 0; t < taps; ++t)
              pixel_offsets[t] =
                  (h * own.stride[0] + t / own.kernel[1] * own.dilation[0]) * row + u.at(t % own.kernel[1] * own.dilation[1]);
            k.sum(levels.data() + last / lanes * u.chunk(), out[1], pixel_offsets.data(), taps, weights.data(), lanes, gain.data(),
                  bias.data(), got.data() + h * out[1] * used, used, used);
          }
          const int64_t filled = (used + 3) / 4 * 4;
          const auto next = quantize::weight::lsq_range(0.3f, 3.f, 15);
          const Buffer<uint8_t> codes(out[1] * filled, fence), want_codes(out[1] * filled, fence);  // of the last row
          k.sum_codes(levels.data() + last / lanes * u.chunk(), out[1], pixel_offsets.data(), taps, weights.data(), lanes, gain.data(),
                      bias.data(), next, 3, codes.data(), filled, used);
          for (int64_t o = 0; o < many * out[1]; ++o)
            for (int64_t l = 0; l < filled; ++l) {
              const float y = l < used ? expected(o, start + last + l, l) : 0.f;
              if (l < used) want[o * used + l] = y;
              if (const int64_t own = o - (many - 1) * out[1]; own >= 0)
                want_codes[own * filled + l] = l < used ? uint8_t(level(F32{y}, next) + 3.f) : 0;
            }
          expect_same(codes, want_codes, "depthwise, codes of pixels: " + what);
          expect_same(got, want, "depthwise, pixels: " + what);
        }
        ++count;
      }
  for (int64_t channels : {1, 16, 21}) {
    const Noise<uint8_t> codes(width * channels, fence, 5);
    const int64_t row = (channels + lanes - 1) / lanes * u.chunk();
    const Buffer<float> got(row, fence), want(row, fence), floats(width * channels, fence);
    for (int64_t i = 0; i < width * channels; ++i) floats[i] = float(codes[i]) - 11.f;
    k.fill_row_of_codes(codes.data(), codes.data() + width * channels, channels, channels, u, 11.f, got.data());
    k.fill_row(floats.data(), floats.data() + width * channels, channels, channels, u, quantize::weight::lsq_range(1.f, 11.f, 255),
               want.data());
    for (int64_t i = 0; i < row; ++i)  // what lies behind the channels of a pixel is the next one's, or of codes nothing
      if (i / u.chunk() * lanes + i % lanes >= channels) got[i] = want[i] = 0;
    expect_same(got, want, "depthwise, codes: " + std::to_string(channels));
    ++count;
  }
  return count;
}

}  // namespace

int64_t check_depthwise(Isa isa, Fence fence) {
  int64_t count = 0;
  for (const Case& own : kCases)
    for (int64_t rows : {100, 2, 1}) count += check(isa, fence, own, rows);
  return count;
}

}  // namespace sanitize
