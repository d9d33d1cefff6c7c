// What the ISAs' files of gemm_kernels.h have in common: plain loops, and the float row in vectors of any width.
#pragma once

#include "../core/lanes.h"
#include "gemm_kernels.h"

namespace quantize::packed {
namespace {

QUANTIZE_INLINE int8_t level_at(const Weights& w, int64_t quad, int byte) {
  const int share = 8 / w.bits;
  const uint8_t packed = w.codes[quad / share * GemmTraits::quad_bytes + byte];
  if (w.bits == 8) return int8_t(packed);
  return w.levels[(packed >> (quad % share * w.bits)) & ((1 << w.bits) - 1)];
}

[[maybe_unused]] void decode_plain(const Weights& w, int8_t* levels) {
  for (int64_t q = 0; q < w.quads; ++q)
    for (int b = 0; b < GemmTraits::quad_bytes; ++b) levels[q * GemmTraits::quad_bytes + b] = level_at(w, q, b);
}

// Quads of levels, 16 dwords of four bytes each, times four activations: byte j of each dword is column's input channel j.
struct FloatRow {
  Lanes sum[GemmTraits::quad];

  QUANTIZE_INLINE void add(const int8_t* levels, const float* x) {
    for (int i = 0; i < Lanes::parts; ++i) {
      Lanes::Whole dwords;
      std::memcpy(&dwords, levels + i * sizeof dwords, sizeof dwords);
      for (int j = 0; j < GemmTraits::quad; ++j)
        sum[j].part[i] += __builtin_convertvector((dwords << (24 - 8 * j)) >> 24, Lanes::Part) * x[j];
    }
  }
  QUANTIZE_INLINE void store(float* acc) const { store_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]), acc); }
};

// decode_some(i, levels): the quads that the i-th 64 bytes hold.
template <typename Decode>
QUANTIZE_INLINE void float_row(const float* x, const Weights& w, float* acc, Decode decode_some) {
  const int share = 8 / w.bits;
  FloatRow row{};
  alignas(64) int8_t levels[4 * GemmTraits::quad_bytes];
  for (int64_t i = 0; i < w.quads / share; ++i) {
    decode_some(w.codes + i * GemmTraits::quad_bytes, levels);
    for (int s = 0; s < share; ++s) row.add(levels + s * GemmTraits::quad_bytes, x + (i * share + s) * GemmTraits::quad);
  }
  row.store(acc);
}

}  // namespace
}  // namespace quantize::packed
