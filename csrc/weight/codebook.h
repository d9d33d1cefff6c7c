// The codebooks by name, as the ops take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>

#include "channel_quantize.h"

namespace quantize::weight {

// uniform: -(2^(b-1) - 1) .. 2^(b-1) - 1, stored as they are. po2, po2plus: 0 and +-2^e, e = 0 .. 2^(b-1) - 2, at most 62.
inline Codebook codebook(const char* op, std::string_view name, int64_t bits, bool least_squares) {
  const bool uniform = name == "uniform", plus = name == "po2plus";
  TORCH_CHECK_VALUE(uniform || plus || name == "po2", op, ": codebook must be uniform, po2 or po2plus; got ", name);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": bits must be between 2 and 8; got ", bits);
  Codebook book{};
  book.least_squares = least_squares;
  book.candidates = 1;
  book.ratio[0] = 1.f;
  if (uniform) {
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

// A weight as its kernels see it: channels along dimension 0, each in one piece.
struct ChannelLayout {
  int64_t channels, elements;
  explicit ChannelLayout(const at::Tensor& w) : channels(w.dim() ? w.size(0) : 1), elements(channels ? w.numel() / channels : 0) {}
};

// Dense with dimension 0 outermost, channels_last weights included, or else a copy that is.
inline at::Tensor channel_memory(const at::Tensor& w) {
  if (w.dim() > 1 && w.is_non_overlapping_and_dense() && w.numel() && w.stride(0) == w.numel() / w.size(0)) return w;
  return w.contiguous();
}

}  // namespace quantize::weight
