// The body of fixed_grid_kernels.h, included by one file per ISA.
#pragma once

#include <algorithm>

#include "../core/lanes.h"
#include "fixed_grid_kernels.h"

#if defined(__SSE2__) && !defined(__F16C__)
#include <emmintrin.h>
#endif

namespace quantize::weight {
namespace {

// A bit a lane, set where the lane's words are all ones (a comparison's result).
QUANTIZE_INLINE uint32_t lane_bits(const Lanes::Whole (&is_set)[Lanes::parts]) {
  uint32_t bits = 0;
  for (int i = 0; i < Lanes::parts; ++i) {
#if defined(__AVX512DQ__)
    const uint32_t part = _mm512_movepi32_mask((__m512i)is_set[i]);
#elif defined(__AVX2__)
    const uint32_t part = uint32_t(_mm256_movemask_ps((__m256)is_set[i]));
#elif defined(__SSE2__)
    const uint32_t part = uint32_t(_mm_movemask_ps((__m128)is_set[i]));
#else
    uint32_t part = 0;
    for (int l = 0; l < Lanes::width; ++l) part |= uint32_t(is_set[i][l] & 1) << l;
#endif
    bits |= part << (i * Lanes::width);
  }
  return bits;
}

// Lane l of bit l, all ones or zeros.
QUANTIZE_INLINE void bit_lanes(uint32_t bits, Lanes::Whole (&is_set)[Lanes::parts]) {
  Lanes::Whole place;
  for (int l = 0; l < Lanes::width; ++l) place[l] = 1 << l;
  for (int i = 0; i < Lanes::parts; ++i) is_set[i] = (Lanes::Whole)(((int32_t(bits) >> (i * Lanes::width)) & place) == place);
}

// Sixteen bits from element i on; what is behind the last element is zero.
QUANTIZE_INLINE void store_bits(uint32_t bits, int64_t i, int64_t left, uint8_t* kept) {
  if (left < lanes) bits &= (1u << left) - 1;
  kept[i / 8] = uint8_t(bits);
  if (left > 8) kept[i / 8 + 1] = uint8_t(bits >> 8);
}

QUANTIZE_INLINE uint32_t load_bits(const uint8_t* kept, int64_t i, int64_t left) {
  return kept[i / 8] | (left > 8 ? uint32_t(kept[i / 8 + 1]) << 8 : 0u);
}

// sign_of for each lane.
QUANTIZE_INLINE Lanes signs_of(Lanes x) {
  for (int i = 0; i < Lanes::parts; ++i) {
    const Lanes::Part v = x.part[i], sign = v < 0.f ? Lanes::Part{} - 1.f : Lanes::Part{} + 1.f;
    x.part[i] = v == v ? sign : v;
  }
  return x;
}

// Whether the lanes are within [low, high], or NaN.
QUANTIZE_INLINE uint32_t passing(Lanes x, float low, float high) {
  Lanes::Whole within[Lanes::parts];
  for (int i = 0; i < Lanes::parts; ++i) within[i] = ~((Lanes::Whole)(x.part[i] < low) | (Lanes::Whole)(x.part[i] > high));
  return lane_bits(within);
}

template <typename T>
void sign_run(const void* source, int64_t n, void* target, uint8_t* kept) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(x + i, n - i);
    store_part(signs_of(v), y + i, n - i);
    store_bits(passing(v, -1.f, 1.f), i, n - i, kept);
  }
}

template <typename T>
void unit_run(const void* source, int64_t n, LsqRange range, void* target, uint8_t* kept) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(x + i, n - i);
    Lanes rounded;
    for (int p = 0; p < Lanes::parts; ++p) {  // lsq_divide
      const Lanes::Part d = v.part[p] * range.inverse, above = d < -65536.f ? Lanes::Part{} - 65536.f : d;
      rounded.part[p] = above > 65536.f ? Lanes::Part{} + 65536.f : above;
    }
    rounded = (rounded + 12582912.f) - 12582912.f;
    store_part(lower(higher(rounded, range.low), range.high) * range.step, y + i, n - i);
    store_bits(passing(v, 0.f, 1.f), i, n - i, kept);
  }
}

template <typename T>
void sign_polynomial_run(const void* source, int64_t n, void* target, uint8_t* kept) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(x + i, n - i), m = magnitude(v);
    store_part(signs_of(v), y + i, n - i);
    Lanes bounded;
    for (int p = 0; p < Lanes::parts; ++p) {  // sign_slope_code
      const Lanes::Part most = m.part[p] < 1.f ? m.part[p] : Lanes::Part{} + 1.f;
      bounded.part[p] = m.part[p] == m.part[p] ? most : Lanes::Part{};
    }
    const Lanes rounded = (bounded * float(sign_slopes) + 12582912.f) - 12582912.f;
    int32_t codes[lanes];
    for (int p = 0; p < Lanes::parts; ++p) {
      const Lanes::Whole code = sign_slopes - __builtin_convertvector(rounded.part[p], Lanes::Whole);
      std::memcpy(codes + p * Lanes::width, &code, sizeof code);
    }
    const int count = n - i < lanes ? int(n - i) : lanes;
    for (int l = count; l < lanes; ++l) codes[l] = 0;
    for (int l = 0; l < count; l += 2) kept[(i + l) / 2] = uint8_t(codes[l] | codes[l + 1] << 4);
  }
}

template <typename T>
void pass_run(const void* grad, const uint8_t* kept, int64_t n, void* target) {
  const T* g = static_cast<const T*>(grad);
  T* out = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    Lanes v = load_part(g + i, n - i);
    Lanes::Whole is_set[Lanes::parts];
    bit_lanes(load_bits(kept, i, n - i), is_set);
    for (int p = 0; p < Lanes::parts; ++p) v.part[p] = is_set[p] ? v.part[p] : Lanes::Part{};
    store_part(v, out + i, n - i);
  }
}

template <typename T>
void slope_run(const void* grad, const uint8_t* kept, int64_t n, void* target) {
  const T* g = static_cast<const T*>(grad);
  T* out = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    const int count = n - i < lanes ? int(n - i) : lanes;
    int32_t codes[lanes] = {};
    for (int l = 0; l < count; l += 2) codes[l] = kept[(i + l) / 2] & 15, codes[l + 1] = kept[(i + l) / 2] >> 4;
    Lanes factor;
    for (int p = 0; p < Lanes::parts; ++p) {
      Lanes::Whole code;
      std::memcpy(&code, codes + p * Lanes::width, sizeof code);
      factor.part[p] = __builtin_convertvector(code, Lanes::Part) * (2.f / float(sign_slopes));
    }
    store_part(load_part(g + i, n - i) * factor, out + i, n - i);
  }
}

template <typename T>
constexpr FixedGridKernels fixed_grid_of{sign_run<T>, sign_polynomial_run<T>, unit_run<T>, pass_run<T>, slope_run<T>};

}  // namespace
}  // namespace quantize::weight
