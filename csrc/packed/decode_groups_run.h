// The body of decode_groups, included by one file per ISA.
#pragma once

#include <algorithm>

#include "../core/lanes.h"
#include "decode_kernels.h"
#include "group_codes.h"

namespace quantize::packed {
namespace {

QUANTIZE_INLINE Lanes load_values(const uint8_t* p) { return load_bytes(p); }

QUANTIZE_INLINE Lanes load_values(const uint16_t* p) {
  float v[lanes];
  for (int l = 0; l < lanes; ++l) v[l] = float(int(p[l]));
  return load_lanes(v);
}

// Of a byte of group_bits: eight times the first group's step, eight times the second's.
QUANTIZE_INLINE Lanes steps_of_two(const float* by_bits, uint8_t bits) {
  Lanes steps;
#if defined(__AVX512F__)
  const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  steps.part[0] = (Lanes::Part)_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(bits), shift), _mm512_loadu_ps(by_bits));
#else
  for (int i = 0; i < Lanes::parts; ++i) steps.part[i] = by_bits[i < Lanes::parts / 2 ? bits & 15 : bits >> 4] - Lanes::Part{};
#endif
  return steps;
}

// Groups of eight, two to a vector; begin, end and span are multiples of it.
template <typename T>
void decode_eights(const T* values, const uint8_t* group_bits, const float* scales, Lanes largest, int64_t begin, int64_t end, int64_t span,
                   float* out) {
  for (int64_t row = begin / span, i = begin; i < end; ++row) {
    float by_bits[lanes];
    store_lanes(Lanes(scales[2 * row + 1]) / largest, by_bits);
    const Lanes low = scales[2 * row];
    for (const int64_t stop = std::min(end, (row + 1) * span); i < stop; i += lanes)
      store_lanes(low + load_values(values + i) * steps_of_two(by_bits, group_bits[i / lanes]), out + i);
  }
}

// A block at a time: first each weight's scale, group by group, then all of them in vectors.
template <typename T>
void decode_groups_of(const void* source, const uint8_t* group_bits, const float* scales, int64_t begin, int64_t end, int64_t group_size,
                      int64_t span, float* out) {
  constexpr int64_t block = 256, store = 8;  // store: at once, beyond the group's end too, where the next group follows
  const T* values = static_cast<const T*>(source);
  float last[lanes];  // largest codes, by bits
  for (int bits = 1; bits <= lanes; ++bits) last[bits - 1] = float((1 << bits) - 1);
  const Lanes largest = load_lanes(last);
  if (group_size == 8 && begin % lanes == 0 && end % lanes == 0 && span % lanes == 0)
    return decode_eights(values, group_bits, scales, largest, begin, end, span, out);
  int64_t group = begin / group_size, row = begin / span, group_end = (group + 1) * group_size, row_end = (row + 1) * span;
  float lows[block + lanes], steps[block + lanes], by_bits[lanes];
  store_lanes(Lanes(scales[2 * row + 1]) / largest, by_bits);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = std::min(block, end - first);
    for (int64_t i = 0; i < count;) {
      const float low = scales[2 * row], step = by_bits[bits_of_group(group_bits, group) - 1];
      const int64_t stop = std::min({count, group_end - first, row_end - first});
      for (; i < stop; i += store)
        for (int64_t j = i; j < i + store; ++j) lows[j] = low, steps[j] = step;
      i = stop;
      if (first + i == group_end) ++group, group_end += group_size;
      if (first + i == row_end) {
        ++row, row_end += span;
        if (first + i < end) store_lanes(Lanes(scales[2 * row + 1]) / largest, by_bits);
      }
    }
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      store_lanes(load_lanes(lows + i) + load_values(values + first + i) * load_lanes(steps + i), out + first + i);
    if (i == count) continue;
    T rest[lanes] = {};
    std::copy(values + first + i, values + first + count, rest);
    store_part(load_lanes(lows + i) + load_values(rest) * load_lanes(steps + i), reinterpret_cast<F32*>(out + first + i), count - i);
  }
}

#define QUANTIZE_DECODE_GROUPS \
  { decode_groups_of<uint8_t>, decode_groups_of<uint16_t> }

}  // namespace
}  // namespace quantize::packed
