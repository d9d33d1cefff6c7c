// Where sums of products go, and what is done with them while a cache holds them.
#pragma once

#include <cstdint>
#include <limits>

#include "image_kernels.h"
#include "panels.h"

namespace quantize::packed {

// What comes after a convolution: a sum, a clip, and the next one's levels.
struct Then {
  const float* residual = nullptr;  // laid out as the output
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  uint8_t* codes = nullptr;  // in place of floats: pixels of `pixel` bytes, channels together
  LsqRange range{};          // of the codes, which the clip is in already
  int32_t zero_point = 0;
  int64_t pixel = 0;

  bool changes() const {
    return residual || low > -std::numeric_limits<float>::infinity() || high < std::numeric_limits<float>::infinity();
  }
};

// A convolution's output, [samples, pixels, channels] where `rows`, else [samples, channels, pixels].
class Output {
 public:
  Output(float* floats, bool rows, int64_t channels, int64_t pixels, const Then& then = {})
      : floats_(floats), channels_(channels), pixels_(pixels), across_(rows ? channels : 1), along_(rows ? 1 : pixels), then_(then) {}

  // `count` pixels of a sample, `columns` channels; acc: rows of `pitch` sums.
  void operator()(const int32_t* acc, int64_t pitch, int64_t count, int64_t columns, const Epilogue::Part& part, int64_t sample,
                  int64_t channel, int64_t pixel) const {
    const auto& kernels = image_kernels();
    if (then_.codes)
      return kernels.finish_codes(acc, pitch, count, columns, part.correction, part.gain, part.bias, then_.range, then_.zero_point,
                                  then_.codes + (sample * pixels_ + pixel) * then_.pixel + channel, then_.pixel);
    const int64_t at = sample * channels_ * pixels_ + channel * along_ + pixel * across_;
    const float* residual = then_.residual ? then_.residual + at : nullptr;
    if (along_ == 1 && then_.changes())
      return kernels.finish_clipped(acc, pitch, count, columns, part.correction, part.gain, part.bias, residual, then_.low, then_.high,
                                    floats_ + at, across_);
    kernels.finish(acc, pitch, count, columns, part.correction, part.gain, part.bias, nullptr, floats_ + at, across_, along_);
    if (then_.changes()) kernels.add_and_clip(floats_ + at, residual, columns, along_, count, then_.low, then_.high);
  }

 private:
  float* floats_;
  int64_t channels_, pixels_, across_, along_;  // from a pixel to the next, and from a channel
  Then then_;
};

}  // namespace quantize::packed
