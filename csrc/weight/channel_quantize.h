// Fake quantization of a weight by channels: what CPU and CUDA share.
//
// A channel w[0..n) with a = max|w|, m = |w| / a, is compared with candidates r: its magnitudes t = |w| anchor / (a r) are rounded to the
// codebook's levels q(t), and sum(mq)^2 / sum(qq) is the part of sum(m^2) that the best scale for these levels explains. The best
// candidate's levels are kept, with their least-squares scale. A single candidate r = 1 without that last step is the max-based scale.
// Candidates that give the same levels tie exactly, whatever was rounded; the first one, the widest, cuts off the fewest gradients.
//
// Ternary weight networks (arXiv 1605.04711) have a rule of their own: levels -1, 0 and 1, of which 0 is for |w| up to 0.7 of the channel's
// mean |w|, and the mean of the others as scale.
//
// Sixteen partial sums in fixed places, added up in one order (core/lanes.h), give every backend the same bits.
#pragma once

#include <algorithm>
#include <cmath>

#include "power_of_two.h"

namespace quantize::weight {

struct Codebook {
  static constexpr int max_candidates = 17;

  bool power_of_two;
  bool ternary;    // of the rest only least_squares, false, counts
  float anchor;    // of the largest level, in the units of t: 2^(b-1) - 1 for uniform levels, 1 for powers of two
  float lowest;    // powers of two: the smallest level but zero; half of it and less is zero
  uint32_t carry;  // power_of_two_carry
  float unit;      // the level that is stored as 1, in the units of t
  float edge;      // weights beyond edge * a r would have rounded to the next level above the largest: they get no gradient
  bool least_squares;
  int candidates;
  float ratio[max_candidates];
};

struct ChannelScale {
  float inverse;  // t = |w| * inverse
  float step;     // |quantized| = step * q
  float scale;    // of the levels as stored: step * unit
  float limit;    // |w| beyond it gets no gradient
};

// power_of_two: 0 and +-2^e, e = 0 .. 2^(bits-1) - 2, at most 62. Else: -(2^(bits-1) - 1) .. 2^(bits-1) - 1.
inline Codebook make_codebook(bool power_of_two, bool plus, int bits, bool least_squares) {
  Codebook book{};
  book.least_squares = least_squares;
  book.candidates = 1;
  book.ratio[0] = 1.f;
  if (!power_of_two) {
    const float largest = float((1 << (bits - 1)) - 1);
    book.anchor = largest, book.lowest = 1.f, book.unit = 1.f, book.edge = (largest + 0.5f) / largest;
    // How much of the range a good scale cuts off grows as bits fall: an eighth of an octave a candidate.
    book.candidates = !least_squares ? 1 : bits >= 7 ? 3 : bits >= 5 ? 6 : bits == 4 ? 9 : 17;
    for (int c = 0; c < book.candidates; ++c) book.ratio[c] = float(std::exp2(-c / 8.));
    return book;
  }
  const int exponents = std::min((1 << (bits - 1)) - 2, 62);
  book.power_of_two = true;
  book.anchor = 1.f, book.lowest = book.unit = float(std::exp2(-exponents)), book.carry = power_of_two_carry<Float32Format>(plus);
  book.edge = plus ? 1.5f : 1.41421356f;
  if (least_squares) {
    // Levels an octave apart: the phase within the octave matters at any width, how far down the largest level lies at few bits.
    book.candidates = 10;
    for (int c = 0; c < book.candidates; ++c) book.ratio[c] = float(std::exp2((1 - c) / 4.));
  }
  return book;
}

inline Codebook make_ternary_codebook() {
  Codebook book{};
  book.ternary = true;
  return book;
}

// Magnitudes above it are not zero. total: of n magnitudes.
QUANTIZE_HOST_DEVICE float ternary_threshold(float total, int64_t n) { return 0.7f * (total / float(n)); }

// above: the sum of the `count` magnitudes above the threshold. No weight is beyond the largest level.
QUANTIZE_HOST_DEVICE ChannelScale ternary_scale(float above, float count) {
  const float scale = count > 0.f ? above / count : 0.f;
  return {0.f, scale, scale, bits_float(0x7f800000u)};
}

// The level of t >= 0.
QUANTIZE_HOST_DEVICE float level_of(float t, const Codebook& book) {
  if (book.power_of_two) {
    const float q = bits_float((float_bits(t) + book.carry) & 0x7f800000u);
    return t <= 0.5f * book.lowest ? 0.f : q > 1.f ? 1.f : q < book.lowest ? book.lowest : q;
  }
  const float q = (t + 12582912.f) - 12582912.f;  // 1.5 * 2^23: to nearest, ties to even
  return q > book.anchor ? book.anchor : q;
}

QUANTIZE_HOST_DEVICE float part_explained(float product, float square) { return product * (product / square); }

// Channels of which nothing can be represented: all zeros, or so small that the scale would be subnormal.
QUANTIZE_HOST_DEVICE bool is_zero_channel(float largest, const Codebook& book) {
  return largest * 0.25f * book.unit / book.anchor < 0x1p-126f;
}

QUANTIZE_HOST_DEVICE ChannelScale zero_channel() { return {0.f, 0.f, 0.f, bits_float(0x7f800000u)}; }

QUANTIZE_HOST_DEVICE ChannelScale poisoned_channel() {
  const float nan = bits_float(0x7fc00000u);
  return {nan, nan, nan, nan};
}

// product, square: the sums of mq and qq at `ratio`.
QUANTIZE_HOST_DEVICE ChannelScale channel_scale(float largest, float ratio, float product, float square, const Codebook& book) {
  const float range = largest * ratio;
  const float step = book.least_squares ? largest * (product / square) : range / book.anchor;
  return {book.anchor / range, step, step * book.unit, book.least_squares ? range * book.edge : bits_float(0x7f800000u)};
}

}  // namespace quantize::weight
