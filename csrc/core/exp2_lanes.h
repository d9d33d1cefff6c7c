// exp2.h, sixteen at a time.
#pragma once

#include <initializer_list>

#include "lanes.h"

namespace quantize {
namespace {

QUANTIZE_INLINE Lanes to_whole(Lanes x) { return (x + 12582912.f) - 12582912.f; }

QUANTIZE_INLINE Lanes exp2_near(Lanes x) {
  const Lanes whole = to_whole(x), f = x - whole;
  Lanes p = 1.5403530e-4f;
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f}) p = p * f + c;
  for (int i = 0; i < Lanes::parts; ++i)
    p.part[i] = (Lanes::Part)((Lanes::Whole)p.part[i] + (__builtin_convertvector(whole.part[i], Lanes::Whole) << 23));
  return p;
}

}  // namespace
}  // namespace quantize
