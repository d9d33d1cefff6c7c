// Bits of the input and of the output, by words of 64 channels: binary_pass.h.
#include "binary_pass.h"

#include <algorithm>

#include "binary_bits.h"

namespace quantize::packed {
namespace {

// 64 of a row of bits, from any bit on; zeros from bit `end` on.
uint64_t bits_at(const uint8_t* bytes, int64_t first, int64_t end) {
  const int64_t word = first / 64, shift = first % 64, left = end - first;
  uint64_t v = word_at(bytes + word * 8) >> shift;
  if (shift && (word + 1) * 64 < end) v |= word_at(bytes + (word + 1) * 8) << (64 - shift);
  return left < 64 ? v & ((uint64_t(1) << left) - 1) : v;
}

void add_lines(const float* __restrict residual, float* __restrict out, int64_t lines, int64_t length, int64_t pitch) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < length; ++j) out[i * pitch + j] += residual[i * pitch + j];
}

}  // namespace

BinaryPass::BinaryPass(const BinaryLayer& layer, BinaryPrepared& prepared) : l_(layer), p_(prepared), kernels_(binary_kernels()) {
  const int64_t planes = l_.planes(), group = l_.window.channels;
  p_.flips.assign(l_.groups * planes, 0);
  if (l_.flip)
    for (int64_t c = 0; c < l_.channels; ++c) p_.flips[c / group * planes + c % group / 64] |= uint64_t(l_.flip[c] & 1) << (c % group % 64);
  p_.shift.assign(l_.out_channels, 0);
  if (l_.unit)
    for (int64_t n = 0; n < l_.out_channels; ++n) {
      int32_t sum = 0;
      for (int64_t t = 0; t < l_.taps(); ++t) sum += l_.sums[t * l_.out_channels + n];
      p_.shift[n] = -binary_ones(int32_t(l_.length()), sum);
    }
  if (!l_.bias) p_.bias.assign(l_.out_channels, 0.f);
}

void BinaryPass::pack(int64_t sample, int64_t group, int64_t plane, uint64_t* words) const {
  const int64_t pixels = l_.height * l_.width, channels = l_.window.channels, first = group * channels + plane * 64;
  const int many = int(std::min<int64_t>(64, channels - plane * 64));
  const uint64_t flip = p_.flips[group * l_.planes() + plane];
  if (l_.bits) {
    const int64_t bytes = (l_.channels + 63) / 64 * 8;
    for (int64_t p = 0; p < pixels; ++p) words[p] = bits_at(l_.bits + (sample * pixels + p) * bytes, first, first + many);
  } else if (l_.rows) {
    const int64_t lines = l_.skip[0] * l_.skip[1] == 1 ? 1 : l_.height, step = l_.skip[1] * l_.channels;
    const float* line = l_.floats + sample * l_.sample + first;
    for (int64_t h = 0; h < lines; ++h, line += l_.line * l_.skip[0])
      kernels_.pack_rows(line, step, pixels / lines, many, threshold(first), flip, words + h * l_.width);
  } else {
    kernels_.pack_planes(l_.floats + sample * l_.sample + first * pixels, pixels, many, threshold(first), flip, words);
  }
}

void BinaryPass::store_bits(const uint16_t* bits, int64_t channel, int many, int64_t count, int64_t pixel) const {
  uint64_t flips = 0;
  for (int c = 0; c < many; ++c) flips |= uint64_t(l_.next_flip ? l_.next_flip[channel + c] & 1 : 0) << c;
  const int64_t bytes = (l_.out_channels + 63) / 64 * 8, shift = channel % 64;
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* word = l_.out_bits + (pixel + i) * bytes + channel / 64 * 8;
    const uint64_t v = bits[i] ^ flips, low = word_at(word) | v << shift;
    std::memcpy(word, &low, 8);
    if (shift + many <= 64) continue;
    const uint64_t high = word_at(word + 8) | v >> (64 - shift);
    std::memcpy(word + 8, &high, 8);
  }
}

void BinaryPass::prefetch(const float* out, int64_t pixels, int64_t channels) const {
  constexpr int64_t line = 16;
  const int64_t pieces = l_.rows ? pixels : channels, floats = l_.rows ? channels : pixels;
  const int64_t step = l_.rows ? l_.out_channels : l_.out_height * l_.out_width;
  const float* residual = l_.residual ? l_.residual + (out - l_.out) : nullptr;
  for (int64_t at = 0; at < pieces * step; at += step)
    for (int64_t i = at; i < at + floats; i += line) {
      __builtin_prefetch(out + i, 1);
      if (residual) __builtin_prefetch(residual + i);
    }
}

void BinaryPass::add_residual(float* out, int64_t pixels, int64_t channels) const {
  if (!l_.residual) return;
  const float* residual = l_.residual + (out - l_.out);
  if (l_.rows)
    add_lines(residual, out, pixels, channels, l_.out_channels);
  else
    add_lines(residual, out, channels, pixels, l_.out_height * l_.out_width);
}

}  // namespace quantize::packed
