// Sixteen floats at a time in the compiler's vector extension: each ISA's object gets its own instructions for them, and sums over lanes
// are added up in one order, so that every ISA returns the same bits. Torch-free.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "half.h"

namespace quantize {
namespace {  // every ISA's object has its own copy, compiled for its own instructions

#define QUANTIZE_INLINE inline __attribute__((always_inline))

constexpr int lanes = 16;

struct Lanes {
  // A register. One type of 64 bytes would do on AVX-512 alone: GCC breaks it up for others, comparisons lane by lane.
#if defined(__AVX512F__)
  static constexpr int width = 16;
#elif defined(__AVX2__)
  static constexpr int width = 8;
#else
  static constexpr int width = 4;
#endif
  static constexpr int parts = lanes / width;
  using Part = float __attribute__((vector_size(4 * width)));
  using Whole = int32_t __attribute__((vector_size(4 * width)));

  Part part[parts];

  Lanes() = default;
  QUANTIZE_INLINE Lanes(float value) {
    for (Part& p : part) p = value - Part{};
  }
};

#define QUANTIZE_LANES_OPERATOR(name, expression)     \
  QUANTIZE_INLINE Lanes name(Lanes a, Lanes b) {      \
    Lanes result;                                     \
    for (int i = 0; i < Lanes::parts; ++i) {          \
      const Lanes::Part x = a.part[i], y = b.part[i]; \
      result.part[i] = expression;                    \
    }                                                 \
    return result;                                    \
  }
QUANTIZE_LANES_OPERATOR(operator+, x + y)
QUANTIZE_LANES_OPERATOR(operator-, x - y)
QUANTIZE_LANES_OPERATOR(operator*, x* y)
QUANTIZE_LANES_OPERATOR(operator/, x / y)
QUANTIZE_LANES_OPERATOR(lower, y < x ? y : x)
QUANTIZE_LANES_OPERATOR(higher, y > x ? y : x)
#undef QUANTIZE_LANES_OPERATOR

QUANTIZE_INLINE Lanes& operator+=(Lanes& a, Lanes b) { return a = a + b; }

// a * b + c in one rounding on every ISA; slow where there is no instruction for it.
QUANTIZE_INLINE Lanes fused_multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  c.part[0] = (Lanes::Part)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif defined(__FMA__)
  for (int i = 0; i < Lanes::parts; ++i) c.part[i] = (Lanes::Part)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
  for (int i = 0; i < Lanes::parts; ++i) {
    Lanes::Part sum = c.part[i];
    for (int l = 0; l < Lanes::width; ++l) sum[l] = __builtin_fmaf(a.part[i][l], b.part[i][l], sum[l]);
    c.part[i] = sum;
  }
#endif
  return c;
}

// a + b * c where both are exact in float: one rounding and two are the same then, on every ISA.
QUANTIZE_INLINE Lanes exact_multiply_add(Lanes a, Lanes b, Lanes c) {
#ifdef __FMA__
  return fused_multiply_add(b, c, a);
#else
  return a + b * c;
#endif
}

QUANTIZE_INLINE Lanes magnitude(Lanes a) {
  for (Lanes::Part& p : a.part) p = (Lanes::Part)((Lanes::Whole)p & 0x7fffffff);
  return a;
}

// -a where b is negative. Zero stays +0.
QUANTIZE_INLINE Lanes with_sign(Lanes a, Lanes b) {
  for (int i = 0; i < Lanes::parts; ++i) a.part[i] = b.part[i] < 0.f ? 0.f - a.part[i] : a.part[i];
  return a;
}

// f less the nearest integer, ties to even, for |f| < 2^22: adding 1.5 * 2^23 leaves that, where there is no instruction for it.
QUANTIZE_INLINE Lanes from_nearest(Lanes f) {
#ifdef __AVX512DQ__
  f.part[0] = _mm512_reduce_ps(f.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (Lanes::Part& p : f.part) p -= (p + 12582912.f) - 12582912.f;
#endif
  return f;
}

QUANTIZE_INLINE Lanes load_lanes(const float* p) {
  Lanes v;  // register by register: a copy in other units stalls the load that follows it
  for (int i = 0; i < Lanes::parts; ++i) std::memcpy(&v.part[i], p + i * Lanes::width, sizeof(Lanes::Part));
  return v;
}

// Sixteen bytes as floats.
QUANTIZE_INLINE Lanes load_bytes(const uint8_t* p) {
  Lanes v;
#if defined(__AVX512F__)
  v.part[0] = (Lanes::Part)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  for (int i = 0; i < Lanes::parts; ++i)
    v.part[i] = (Lanes::Part)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i))));
#else
  for (int l = 0; l < lanes; ++l) v.part[l / Lanes::width][l % Lanes::width] = float(p[l]);
#endif
  return v;
}

QUANTIZE_INLINE Lanes load_lanes(const F32* p) { return load_lanes(&p->value); }

// Sixteen values of a 16-bit type.
template <typename T>
QUANTIZE_INLINE Lanes load_lanes(const T* p) {
#ifdef __AVX2__
  Lanes v;
#ifdef __AVX512F__
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (T::scalar == Scalar::f16)
    v.part[0] = (Lanes::Part)_mm512_cvtph_ps(words);
  else
    v.part[0] = (Lanes::Part)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
#else
  for (int i = 0; i < Lanes::parts; ++i) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    if constexpr (T::scalar == Scalar::f16)
      v.part[i] = (Lanes::Part)_mm256_cvtph_ps(words);
    else
      v.part[i] = (Lanes::Part)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
  }
#endif
  return v;
#else
  float v[lanes];
  for (int l = 0; l < lanes; ++l) v[l] = to_float(p[l]);
  return load_lanes(v);
#endif
}

// Of thirty-two numbers the first, third, ... and the second, fourth, ...
QUANTIZE_INLINE void split_pairs(Lanes a, Lanes b, Lanes& first, Lanes& second) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  first.part[0] = (Lanes::Part)_mm512_permutex2var_ps((__m512)a.part[0], index, (__m512)b.part[0]);
  second.part[0] = (Lanes::Part)_mm512_permutex2var_ps((__m512)a.part[0], _mm512_or_si512(index, _mm512_set1_epi32(1)), (__m512)b.part[0]);
#elif defined(__AVX2__)
  const Lanes from[] = {a, b};
  for (int i = 0; i < 2; ++i) {
    const __m256 low = (__m256)from[i].part[0], high = (__m256)from[i].part[1];
    const auto in_order = [](__m256 v) { return (Lanes::Part)_mm256_permute4x64_pd((__m256d)v, 0xd8); };
    first.part[i] = in_order(_mm256_shuffle_ps(low, high, 0x88)), second.part[i] = in_order(_mm256_shuffle_ps(low, high, 0xdd));
  }
#else
  for (int i = 0; i < lanes; ++i) {
    const Lanes& from = i < lanes / 2 ? a : b;
    const int at = 2 * i % lanes;
    first.part[i / Lanes::width][i % Lanes::width] = from.part[at / Lanes::width][at % Lanes::width];
    second.part[i / Lanes::width][i % Lanes::width] = from.part[at / Lanes::width][at % Lanes::width + 1];
  }
#endif
}

QUANTIZE_INLINE void store_lanes(Lanes v, float* p) {
  for (int i = 0; i < Lanes::parts; ++i) std::memcpy(p + i * Lanes::width, &v.part[i], sizeof(Lanes::Part));
}

// round_nearest for each lane.
template <typename T>
QUANTIZE_INLINE void store_lanes(Lanes v, T* p) {
  if constexpr (T::scalar == Scalar::f32) return store_lanes(v, &p->value);
#ifdef __AVX512F__
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 x = (__m512)v.part[0];
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m256i words;
  if constexpr (T::scalar == Scalar::f16) {
    words = _mm512_cvtps_ph(_mm512_mask_blend_ps(is_nan, x, _mm512_set1_ps(__builtin_nanf(""))), nearest);
  } else {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000)), 16));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
#elif defined(__AVX2__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  for (int i = 0; i < Lanes::parts; ++i) {
    const __m256 x = (__m256)v.part[i], is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m128i words;
    if constexpr (T::scalar == Scalar::f16) {
      words = _mm256_cvtps_ph(_mm256_blendv_ps(x, _mm256_set1_ps(__builtin_nanf("")), is_nan), nearest);
    } else {
      const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
      const __m256i whole = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
      const __m256i high = _mm256_srli_epi32(whole, 16);
      words = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, words);
  }
#else
  float values[lanes];
  store_lanes(v, values);
  for (int l = 0; l < lanes; ++l) p[l] = round_nearest(values[l], T{});
#endif
}

// Past the caches, to an address that 64 divides: for what is read again only after they have seen more than they hold. Other threads see
// it after end_streams().
QUANTIZE_INLINE void stream_lanes(Lanes v, F32* p) {
#if defined(__AVX512F__)
  _mm512_stream_ps(&p->value, (__m512)v.part[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < Lanes::parts; ++i) _mm256_stream_ps(&p[i * Lanes::width].value, (__m256)v.part[i]);
#else
  store_lanes(v, p);
#endif
}

QUANTIZE_INLINE void end_streams() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// The first `count` lanes at most, zeros behind them.
template <typename T>
QUANTIZE_INLINE Lanes load_part(const T* p, int64_t count) {
  if (count >= lanes) return load_lanes(p);
  float rest[lanes];
  if constexpr (T::scalar == Scalar::f32) {  // a condition in the loop costs more than its end
    for (float& value : rest) value = 0.f;
    for (int l = 0; l < int(count); ++l) rest[l] = to_float(p[l]);
  } else {
    for (int l = 0; l < lanes; ++l) rest[l] = l < count ? to_float(p[l]) : 0.f;
  }
  return load_lanes(rest);
}

QUANTIZE_INLINE Lanes load_part(const float* p, int64_t count) { return load_part(reinterpret_cast<const F32*>(p), count); }

template <typename T>
QUANTIZE_INLINE void store_part(Lanes v, T* p, int64_t count) {
  if (count >= lanes) return store_lanes(v, p);
  float rest[lanes];
  store_lanes(v, rest);
  for (int l = 0; l < count; ++l) p[l] = round_nearest(rest[l], T{});
}

// The lanes joined eight by eight, four by four and so on: short chains, and one order for every width.
template <typename Join>
QUANTIZE_INLINE float reduce_lanes(Lanes v, Join join) {
  using Quarter = float __attribute__((vector_size(16)));
  Quarter q[4];
  float values[lanes];
  store_lanes(v, values);
  std::memcpy(q, values, sizeof q);
  const Quarter all = join(join(q[0], q[2]), join(q[1], q[3]));
  return join(join(all[0], all[2]), join(all[1], all[3]));
}

QUANTIZE_INLINE float sum_of(Lanes v) {
  return reduce_lanes(v, [](auto a, auto b) { return a + b; });
}

}  // namespace
}  // namespace quantize
