// Warp-level primitives of the CUDA kernels.
//
// The kernels include no torch headers and name no hardware feature but through these functions and CUDA's own spelling, so that
// tests/cuda_on_host can compile them for the CPU and run them lane by lane on machines without a GPU.
#pragma once

#include <cmath>
#include <utility>

#include "half.h"

#define QUANTIZE_DEVICE __device__ __forceinline__

namespace quantize {

struct Warp {
  static constexpr int lanes = 32;
  static constexpr unsigned all = 0xffffffffu;  // every kernel here keeps its warps whole
};

// body.template operator()<i>() for i = 0 .. n - 1: register arrays are indexed by constants only.
template <int n, typename F>
QUANTIZE_DEVICE void static_for(const F& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (body.template operator()<i>(), ...); }
  (std::make_integer_sequence<int, n>{});
}

template <typename T>
struct VectorTraits {
  static constexpr int elements = 16 / sizeof(T);  // of one 16-byte load
};

// NaN if either is: the poison test of a range costs nothing.
QUANTIZE_DEVICE float min_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a != a || b != b ? NAN : a < b ? a : b;
#endif
}

QUANTIZE_DEVICE float to_float_device(F32 x) { return x.value; }
QUANTIZE_DEVICE float to_float_device(BF16 x) { return to_float(x); }
QUANTIZE_DEVICE float to_float_device(F16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return to_float(x);
#endif
}

// The same of two 16-bit numbers in a word.
template <typename T>
QUANTIZE_DEVICE uint32_t packed_min_or_nan(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t c;
  if constexpr (T::scalar == Scalar::f16)
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  uint32_t c = 0;
  for (int half = 0; half < 32; half += 16) {
    const T x{uint16_t(a >> half)}, y{uint16_t(b >> half)};
    const float least = min_or_nan(to_float(x), to_float(y));
    c |= uint32_t(least != least ? 0x7fff : least == to_float(x) ? x.bits : y.bits) << half;
  }
  return c;
#endif
}

template <typename T>
QUANTIZE_DEVICE uint32_t packed_max_or_nan(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t c;
  if constexpr (T::scalar == Scalar::f16)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  constexpr uint32_t signs = 0x80008000u;
  return packed_min_or_nan<T>(a ^ signs, b ^ signs) ^ signs;
#endif
}

// Element i of a 16-byte vector.
QUANTIZE_DEVICE uint32_t vector_word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <typename T>
QUANTIZE_DEVICE float vector_element(const uint4& v, int i) {
  if constexpr (T::scalar == Scalar::f32) {
    return bits_float(vector_word(v, i));
  } else if constexpr (T::scalar == Scalar::bf16) {
    const uint32_t pair = vector_word(v, i / 2);
    return bits_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  } else {
    return to_float_device(F16{uint16_t(vector_word(v, i / 2) >> (16 * (i % 2)))});
  }
}

template <typename T>
QUANTIZE_DEVICE uint32_t value_word(const float* values) {  // 32 bits of a vector: one value or two
  if constexpr (T::scalar == Scalar::f32)
    return float_bits(values[0]);
  else
    return uint32_t(round_nearest(values[1], T{}).bits) << 16 | round_nearest(values[0], T{}).bits;
}

template <typename T>
QUANTIZE_DEVICE uint4 pack_vector(const float (&values)[VectorTraits<T>::elements]) {
  constexpr int per_word = VectorTraits<T>::elements / 4;
  return {value_word<T>(values), value_word<T>(values + per_word), value_word<T>(values + 2 * per_word),
          value_word<T>(values + 3 * per_word)};
}

// Sums of the lanes, of R rows and of the `some` columns that a warp has of a block's: to all[row][column].
template <int R, int some, typename T>
QUANTIZE_DEVICE void share_sums(T (&sums)[R][some], T (*all)[Warp::lanes]) {
  const int lane = threadIdx.x % Warp::lanes, first = threadIdx.x / Warp::lanes * some;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < some; ++j) {
#pragma unroll
      for (int mask = Warp::lanes / 2; mask > 0; mask /= 2) sums[r][j] += __shfl_xor_sync(Warp::all, sums[r][j], mask);
      if (lane == 0) all[r][first + j] = sums[r][j];
    }
  __syncthreads();
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace quantize
