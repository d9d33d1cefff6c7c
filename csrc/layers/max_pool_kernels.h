// CPU kernels of max pools over images: the maxima and, where asked, their offsets within their windows. Torch-free.
//
// Of equal values the first one of the window counts, of NaNs the last one, as in PyTorch; without offsets, of zeros of
// both signs any.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/cpu_isa.h"
#include "../core/half.h"

namespace quantize::layers {

// Heights before widths. Every window must have a tap inside of the input.
struct PoolShape {
  int64_t input[2], output[2], kernel[2], stride[2], padding[2], dilation[2];

  // Where window `place` begins along dimension d: before 0 in the padding.
  int64_t start(int d, int64_t place) const { return place * stride[d] - padding[d]; }
  // Its taps that lie in the input: [first_tap, end_tap).
  int64_t first_tap(int d, int64_t start) const { return start < 0 ? (dilation[d] - 1 - start) / dilation[d] : 0; }
  int64_t end_tap(int d, int64_t start) const { return std::min(kernel[d], (input[d] - start + dilation[d] - 1) / dilation[d]); }

  // A row of the input with its padding, and room for what a vector touches beyond: columns; of them those of one phase, which are the same
  // tap of neighbouring windows; bytes of memory that plane() takes.
  int64_t columns() const {
    return std::max((output[1] - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1, padding[1] + input[1]) + vector;
  }
  int64_t phase() const { return (columns() + stride[1] - 1) / stride[1] + vector; }
  int64_t scratch() const { return phase() * stride[1] * 16; }

  int64_t row_scratch(int64_t channels) const { return (input[1] * channels + vector) * 4; }

  static constexpr int64_t vector = 16;  // floats of the kernels' vectors
};

struct MaxPoolKernels {
  // A plane [height, width]. y: [out_height, out_width]; offsets: the same, or null; scratch: of shape.scratch() bytes.
  void (*plane)(const void* x, const PoolShape& shape, void* y, uint8_t* offsets, void* scratch);
  // Row `place` of the output of an image [height, width, channels]: y, offsets: [out_width, channels]; scratch: of
  // shape.row_scratch(channels) bytes, where offsets is null.
  void (*row)(const void* x, int64_t channels, const PoolShape& shape, int64_t place, void* y, uint8_t* offsets, void* scratch);
};

// Indexed by Scalar.
extern const MaxPoolKernels max_pool_portable[3];
extern const MaxPoolKernels max_pool_avx2[3];
extern const MaxPoolKernels max_pool_avx512[3];

inline const MaxPoolKernels& max_pool_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, max_pool)[int(scalar)]; }

}  // namespace quantize::layers
