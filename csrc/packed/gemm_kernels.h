// Integer products of packed weights with 8-bit activations: exact int32 results, the same on every ISA. Torch-free.
//
// Weights lie in panels of 16 output channels. A quad is four successive input channels of one tap: 64 bytes of int8, channel by channel
// ([16][4]). Narrower weights keep codes: 64 bytes hold two quads as nibbles (the first in the low halves) or four as crumbs. Codes are
// looked up in a table of up to 16 levels.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

struct GemmTraits {
  static constexpr int columns = 16, quad = 4, quad_bytes = 64;
  // Products of one row wait for memory. The hardware's prefetcher stops at the end of a page: so a few panels at a time, and bytes ahead.
  static constexpr int streams = 4, prefetch = 2048;
  static constexpr int rows = 12;  // of the largest register tile: 12 x 2 accumulators, 2 weights and an activation in 32 registers
};

struct Weights {
  const uint8_t* codes;  // the panel
  int64_t quads;         // stored: a multiple of 8 / bits
  int bits;              // 2, 4 or 8
  const int8_t* levels;  // [16], of codes below 8 bits
  int steps;             // how many pairs of products an int16 holds: 64 of levels within +-1, 9 within +-7, 1 within +-64, else none

  int64_t bytes() const { return quads * bits * GemmTraits::quad_bytes / 8; }
};

struct GemmKernels {
  // levels: quads * 64 bytes of int8.
  void (*decode)(const Weights& weights, int8_t* levels);
  // acc[i][16 * tiles] = products of row i with `tiles` (1 or 2) decoded panels. Row i's quad q of tap t lies at x + rows[i] + taps[t] +
  // 4q.
  void (*multiply)(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads,
                   const int8_t* levels, int64_t panel_bytes, int tiles, int steps, int32_t* acc);
  // acc[16 * tiles] = one row x[4 * quads] times successive panels, at most `streams`, that are decoded on the way.
  void (*multiply_row)(const uint8_t* x, const Weights& first, int tiles, int32_t* acc);
  // The same with float activations; sums in four parts in fixed order.
  void (*multiply_row_float)(const float* x, const Weights& weights, float* acc);
};

extern const GemmKernels gemm_portable, gemm_avx2, gemm_avx512vnni;

inline const GemmKernels& gemm_kernels() {
#ifdef QUANTIZE_X86
  if (cpu_isa() >= Isa::avx512 && cpu_has_vnni()) return gemm_avx512vnni;
  if (cpu_isa() != Isa::portable) return gemm_avx2;  // without VNNI, 512-bit products gain little and cost the clock
#endif
  return gemm_portable;
}

}  // namespace quantize::packed
