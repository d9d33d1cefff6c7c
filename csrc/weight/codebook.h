// The codebooks by name, as the ops take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string_view>

#include "channel_quantize.h"

namespace quantize::weight {

// uniform: -(2^(b-1) - 1) .. 2^(b-1) - 1, stored as they are. po2, po2plus: 0 and +-2^e, e = 0 .. 2^(b-1) - 2, at most 62. ternary: -1, 0,
// 1 at 2 bits, with a scale by its own rule.
inline Codebook codebook(const char* op, std::string_view name, int64_t bits, bool least_squares) {
  const bool uniform = name == "uniform", plus = name == "po2plus";
  if (name == "ternary") {
    TORCH_CHECK_VALUE(bits == 2 && !least_squares, op, ": ternary must have 2 bits and no least_squares; got ", bits, " and ",
                      least_squares);
    return make_ternary_codebook();
  }
  TORCH_CHECK_VALUE(uniform || plus || name == "po2", op, ": codebook must be uniform, po2, po2plus or ternary; got ", name);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": bits must be between 2 and 8; got ", bits);
  return make_codebook(!uniform, plus, int(bits), least_squares);
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
