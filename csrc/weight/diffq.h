// DiffQ (arXiv 2104.09987): what every backend shares.
//
// Training:   w~ = w + range * n / (2^b - 1), n of deviation 1 / sqrt(12), b = min + (max - min) sigmoid(logit), a logit for each group.
// Evaluation: b is rounded, step = range / (2^b - 1), w becomes low + step * round((w - low) / step).
//
// Groups are `group_size` consecutive weights of a tensor, ranges belong to `span` consecutive weights; neither need divide the other.
// The noise of element i depends on its place, the seed and the tensor's stream only, so backward draws it again.
#pragma once

#include "../core/exp2.h"

namespace quantize::weight {

struct DiffQTraits {
  // Elements whose noise is drawn together: element i of a block has slot i / 16 of counter i % 16, so that 16 lanes or threads that each
  // run a counter write neighbours. A counter has eight sixteen-bit numbers, and each of them serves twice, the second time with its bytes
  // exchanged: what the two have in common is far below the noise's own size.
  static constexpr int counters = 16, slots = 16, block = counters * slots;
  static constexpr int piece = 2048;  // elements whose sums are taken in one order, by whichever thread
};

// Bounds of the learned bits.
struct BitsBounds {
  float low, span;        // b = low + span * sigmoid(logit)
  float least, greatest;  // whole numbers of bits within
};

struct LearnedBits {
  float bits, sigmoid, slope;  // slope: db / dlogit
};

// A logit that is NaN counts as the most bits, with no slope: it harms nothing and can be repaired.
QUANTIZE_HOST_DEVICE LearnedBits learned_bits(float logit, BitsBounds bounds) {
  const float upper = logit < 60.f ? logit : 60.f, l = upper > -60.f ? upper : -60.f;  // NaN: 60
  const float sigmoid = 1.f / (1.f + exp2_near(l * -1.44269504f));
  return {bounds.low + bounds.span * sigmoid, sigmoid, bounds.span * (sigmoid * (1.f - sigmoid))};
}

QUANTIZE_HOST_DEVICE float rounded_bits(float bits, BitsBounds bounds) {
  const float whole = (bits + 12582912.f) - 12582912.f, low = whole > bounds.least ? whole : bounds.least;
  return low < bounds.greatest ? low : bounds.greatest;
}

struct NoiseScale {
  float inverse;  // 1 / (2^b - 1)
  float slope;    // d inverse / d logit
};

QUANTIZE_HOST_DEVICE NoiseScale noise_scale(LearnedBits b) {
  const float levels = exp2_near(b.bits), inverse = 1.f / (levels - 1.f);
  return {inverse, -0.69314718f * levels * inverse * inverse * b.slope};
}

// The two sixteen-bit numbers of a word with their bytes exchanged; Word is uint32_t, or a vector of it.
template <typename Word>
QUANTIZE_HOST_DEVICE Word exchange_bytes(Word w) {
  return (w & 0x00ff00ffu) << 8 | (w >> 8 & 0x00ff00ffu);
}

// A sixteen-bit number as noise: evenly over (-1/2, 1/2), or the quantile of another distribution.
QUANTIZE_HOST_DEVICE float noise_of(uint32_t u, const float* quantiles) {
  return quantiles ? quantiles[u] : float(int32_t(u)) * 0x1p-16f + (0x1p-17f - 0.5f);
}

// The grid point for w. `steps`: 2^b - 1.
QUANTIZE_HOST_DEVICE float on_grid(float w, float low, float range, float steps) {
  const float step = range / steps, ratio = step > 0.f ? (w - low) / step : 0.f;
  const float whole = (ratio + 12582912.f) - 12582912.f, above = whole < 0.f ? 0.f : whole;
  return low + (above > steps ? steps : above) * step;
}

}  // namespace quantize::weight
