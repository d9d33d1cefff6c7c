// Noise sixteen at a time, and stretches of elements: what the kernels of diffq, clipped_noise and dorefa share. Included by one file per
// ISA.
#pragma once

#include "../core/exp2_lanes.h"
#include "../core/philox_lanes.h"
#include "diffq.h"

namespace quantize::weight {
namespace {

constexpr int block = DiffQTraits::block, piece = DiffQTraits::piece;

QUANTIZE_INLINE Lanes::Part looked_up(const float* table, Words::Part places) {
  float values[Lanes::width];
  for (int l = 0; l < Lanes::width; ++l) values[l] = table[places[l]];
  Lanes::Part v;
  std::memcpy(&v, values, sizeof v);
  return v;
}

// use(i, noise_of) for lanes i to i + 15 of a block of elements.
template <bool uniform, typename Use>
QUANTIZE_INLINE void each_noise(Seed seed, uint32_t stream, const float* quantiles, int64_t index, const Use& use) {
  Words word[4];
  philox_lanes(uint32_t(index) * DiffQTraits::counters, stream, seed, word);
#pragma GCC unroll 16
  for (int slot = 0; slot < DiffQTraits::slots; ++slot) {
    Lanes v;
    for (int p = 0; p < Lanes::parts; ++p) {
      const Words::Part own = word[slot % 8 / 2].part[p], w = slot < 8 ? own : exchange_bytes(own), u = slot % 2 ? w >> 16 : w & 0xffffu;
      if constexpr (uniform)
        v.part[p] = __builtin_convertvector((Lanes::Whole)u, Lanes::Part) * 0x1p-16f + (0x1p-17f - 0.5f);
      else
        v.part[p] = looked_up(quantiles, u);
    }
    use(slot * lanes, v);
  }
}

QUANTIZE_INLINE void draw_noise(Seed seed, uint32_t stream, const float* quantiles, int64_t index, float* noise) {
  const auto store = [&](int i, Lanes v) __attribute__((always_inline)) { store_lanes(v, noise + i); };
  quantiles ? each_noise<false>(seed, stream, quantiles, index, store) : each_noise<true>(seed, stream, quantiles, index, store);
}

// Zeros behind the first `count` lanes.
QUANTIZE_INLINE Lanes first_lanes(Lanes v, int64_t count) {
  float values[lanes];
  store_lanes(v, values);
  return load_part(values, std::clamp<int64_t>(count, 0, lanes));
}

// body(unit, from, to): the parts of [begin, end) that lie in one unit of `size` elements each; counted from begin.
template <typename Body>
QUANTIZE_INLINE void for_units(int64_t begin, int64_t end, int64_t size, const Body& body) {
  int64_t unit = begin / size, next = (unit + 1) * size;
  for (int64_t i = begin; i < end; ++unit, next += size) {
    const int64_t stop = std::min(next, end);
    body(unit, i - begin, stop - begin);
    i = stop;
  }
}

// The noise of elements [begin, end), at most a piece, all of one block-aligned stretch or the ends of it.
QUANTIZE_INLINE const float* draw(Seed seed, uint32_t stream, const float* quantiles, int64_t begin, int64_t end, float* buffer) {
  const int64_t first = begin / block;
  for (int64_t index = first; index * block < end; ++index) draw_noise(seed, stream, quantiles, index, buffer + (index - first) * block);
  return buffer + begin % block;
}

}  // namespace
}  // namespace quantize::weight
