// CPU kernels of the batch norm: its normalized input, or its output again; sums over a run of decoded elements, then the input's gradient.
// Torch-free.
//
// A run is `count` consecutive elements of one sample, in memory order, from number `first` on. Element e belongs to
//   planes (inner > 0): channel e / inner; one channel's elements lie together (contiguous tensors);
//   rows (inner = 0):   column e % width; channels alternate (channels_last, [N, C]) and are repeated up to `width` columns.
// Arrays have a value for each channel or column, and `slack` more that may be read and written but mean nothing.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"
#include "../core/half.h"

namespace quantize::layers {

struct ChannelRun {
  int64_t first, count;
  int64_t inner, width;

  static constexpr int slack = 16;
  // Floats a sum is kept in: a vector's lanes for each channel, or one for each column.
  int64_t slots() const { return (inner ? 16 * width : width) + slack; }
};

// Sums of g, g x and g^2, `slots` each, which reduce adds to; `square` may be null.
struct ChannelSums {
  float *grad, *product, *square;
};

struct ChannelTerms {
  const float *offset, *slope, *gain;
};

// x: the normalized input, but of `normalize`.
struct BatchNormKernels {
  void (*reduce)(const void* x, const void* grad, ChannelRun run, ChannelSums sums);
  // ((g - offset) - x * slope) * gain
  void (*apply)(const void* x, const void* grad, ChannelRun run, ChannelTerms terms, void* grad_input);
  // (x - offset) * gain
  void (*normalize)(const void* x, ChannelRun run, ChannelTerms terms, void* y);
  // x * gain + offset; x and y may be the same memory.
  void (*scale)(const void* x, ChannelRun run, ChannelTerms terms, void* y);
};

// Indexed by Scalar.
extern const BatchNormKernels batch_norm_portable[3];
extern const BatchNormKernels batch_norm_avx2[3];
extern const BatchNormKernels batch_norm_avx512[3];

inline const BatchNormKernels& batch_norm_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, batch_norm)[int(scalar)]; }

}  // namespace quantize::layers
