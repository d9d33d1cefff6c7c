// Binary layers whose channels come in words, where the machine counts the bits of 32-bit words itself: exact, the same results as those of
// binary_kernels.h. Torch-free.
//
// Lanes are output channels, so that sums begin and end where outputs lie. An image is rows of bits, a pixel's channels together: what a
// line of the kernel meets is one run of words, read where it lies and broadcast. The weights of 32 channels are turned, word by word,
// before all pixels pass them. What taps outside of the image have counted is in the offset that a sum begins with.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

struct ColumnTraits {
  static constexpr int columns = 32;  // output channels that are multiplied together
  static constexpr int pixels = 64;   // of a line, at most, whose sums lie together before they are finished
};

// The words of 32 bits that an output pixel meets: `count` runs of `length`, each of them starting somewhere behind its first.
struct ColumnRuns {
  const int32_t* starts;
  int64_t count, length;
};

struct BinaryColumnKernels {
  // Up to 32 rows of codes, 4 * words bytes each, to columns[word][32]. Columns that are missing are zero.
  void (*turn)(const uint8_t* codes, int64_t words, int channels, uint32_t* columns);
  // sums[pixel][c] = offsets[places[pixel] + c] + factor * popcount(x ^ w) of 1 to 64 pixels and all 32 columns, the factor -2, or 1 where
  // bits are units; a pixel is `step` words behind the one before.
  void (*multiply)(const uint32_t* x, int64_t step, int64_t pixels, ColumnRuns runs, const uint32_t* columns, const int32_t* offsets,
                   const int32_t* places, bool unit, int32_t* sums);
  // Four bytes a pixel, every `step` bytes: bit c = (sums[pixel][c] < threshold[c]) ^ flip's, of up to 32 channels; 0 behind them.
  void (*compare)(const int32_t* sums, int64_t pixels, int channels, const int32_t* threshold, uint32_t flip, uint8_t* bits, int64_t step);
};

extern const BinaryColumnKernels binary_columns_avx512vpopcntdq;

// Null where popcounts are sooner had otherwise.
inline const BinaryColumnKernels* binary_column_kernels() {
#ifdef QUANTIZE_X86
  if (cpu_isa() >= Isa::avx512 && cpu_has_vpopcntdq()) return &binary_columns_avx512vpopcntdq;
#endif
  return nullptr;
}

}  // namespace quantize::packed
