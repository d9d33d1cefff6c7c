// A bit for each of sixteen lanes: comparisons, choices by them, and the same as bits of a number, lane 0 lowest. Torch-free.
#pragma once

#include "lanes.h"

namespace quantize {
namespace {

struct LaneMask {
#if defined(__AVX512F__)
  __mmask16 bits;
#else
  Lanes::Whole part[Lanes::parts];  // all ones or all zeros
#endif
};

#if defined(__AVX512F__)
QUANTIZE_INLINE LaneMask at_most(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask((__m512)a.part[0], (__m512)b.part[0], _CMP_LE_OQ)}; }
QUANTIZE_INLINE LaneMask below(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask((__m512)a.part[0], (__m512)b.part[0], _CMP_LT_OQ)}; }
QUANTIZE_INLINE LaneMask operator|(LaneMask a, LaneMask b) { return {__mmask16(a.bits | b.bits)}; }
QUANTIZE_INLINE unsigned bits_of(LaneMask mask) { return mask.bits; }
QUANTIZE_INLINE LaneMask mask_of(unsigned bits) { return {__mmask16(bits)}; }
QUANTIZE_INLINE Lanes choose(LaneMask mask, Lanes a, Lanes b) {
  a.part[0] = (Lanes::Part)_mm512_mask_blend_ps(mask.bits, (__m512)b.part[0], (__m512)a.part[0]);
  return a;
}
#else
// a <= b; of NaN it is false.
QUANTIZE_INLINE LaneMask at_most(Lanes a, Lanes b) {
  LaneMask mask;
  for (int i = 0; i < Lanes::parts; ++i) mask.part[i] = a.part[i] <= b.part[i];
  return mask;
}

// a < b, likewise.
QUANTIZE_INLINE LaneMask below(Lanes a, Lanes b) {
  LaneMask mask;
  for (int i = 0; i < Lanes::parts; ++i) mask.part[i] = a.part[i] < b.part[i];
  return mask;
}

QUANTIZE_INLINE LaneMask operator|(LaneMask a, LaneMask b) {
  for (int i = 0; i < Lanes::parts; ++i) a.part[i] |= b.part[i];
  return a;
}

QUANTIZE_INLINE unsigned bits_of(LaneMask mask) {
  unsigned bits = 0;
  for (int i = 0; i < Lanes::parts; ++i) {
#if defined(__AVX2__)
    bits |= unsigned(_mm256_movemask_ps((__m256)mask.part[i])) << (i * Lanes::width);
#else
    const Lanes::Whole one = mask.part[i] & Lanes::Whole{1, 2, 4, 8};
    bits |= unsigned(one[0] | one[1] | one[2] | one[3]) << (i * Lanes::width);
#endif
  }
  return bits;
}

QUANTIZE_INLINE LaneMask mask_of(unsigned bits) {
  Lanes::Whole bit;
  for (int l = 0; l < Lanes::width; ++l) bit[l] = 1 << l;
  LaneMask mask;
  for (int i = 0; i < Lanes::parts; ++i) mask.part[i] = (int32_t(bits >> (i * Lanes::width)) & bit) == bit;
  return mask;
}

// a where the bit is set, else b.
QUANTIZE_INLINE Lanes choose(LaneMask mask, Lanes a, Lanes b) {
  for (int i = 0; i < Lanes::parts; ++i) {
#if defined(__AVX2__)
    a.part[i] = (Lanes::Part)_mm256_blendv_ps((__m256)b.part[i], (__m256)a.part[i], (__m256)mask.part[i]);
#else
    a.part[i] = (Lanes::Part)(((Lanes::Whole)a.part[i] & mask.part[i]) | ((Lanes::Whole)b.part[i] & ~mask.part[i]));
#endif
  }
  return a;
}
#endif

QUANTIZE_INLINE Lanes at_most_else(Lanes a, Lanes b, Lanes yes, Lanes no) { return choose(at_most(a, b), yes, no); }

}  // namespace
}  // namespace quantize
