// The scalar twin of the vector kernels: the whole of the portable ISA, and groups whose range is extreme or poisoned on the others.
#pragma once

#include <cstring>

#include "group_quantize_kernels.h"

namespace quantize::activation {
namespace {  // every ISA's object has its own copy, compiled for its own instructions

// Not std::min: a template of namespace std would be one symbol for all objects, and the linker could keep the AVX-512 one.
QUANTIZE_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <int bits>
void clear_codes(int64_t begin, int64_t end, int64_t n, uint8_t* codes) {
  const int64_t first = begin * bits / 8, last = end == n ? code_bytes(n, bits) : end * bits / 8;
  std::memset(codes + first, 0, last - first);
}

template <typename T>
Extent scalar_extent(const T* x, int64_t n) {
  Extent extent{to_float(x[0]), to_float(x[0]), true};
  float poison = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    extent.min = value < extent.min ? value : extent.min;
    extent.max = value > extent.max ? value : extent.max;
    poison += value * 0.f;  // NaN and Inf leave NaN
  }
  extent.finite = poison == 0.f;
  return extent;
}

// Elements [begin, n) of a group of n; begin is a multiple of two chunks, so of every block. x and codes point to the group's start.
template <typename T, int bits>
void scalar_encode(const T* x, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, uint8_t* codes) {
  clear_codes<bits>(begin, end, n, codes);
  for (int64_t chunk = begin; chunk < end; chunk += GroupTraits::chunk) {
    Philox4 draws[8];
    for (int lane = 0; lane < 8; ++lane) draws[lane] = philox4x32(noise_counter(chunk + lane), group, seed);
    const int64_t stop = least(end, chunk + GroupTraits::chunk);
    for (int64_t e = chunk; e < stop; ++e) {
      const uint32_t code = encode(to_float(x[e]), range, noise_bits(draws[e % 8], e), bits);
      const int64_t bit = code_bit(e, n, bits);
      codes[bit / 8] |= uint8_t(code << (bit % 8));
    }
  }
}

template <typename T, int bits>
void scalar_decode(const uint8_t* codes, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, T* y) {
  constexpr uint32_t mask = (1u << bits) - 1;
  const uint32_t key = T::scalar == Scalar::f32 ? 0 : dither_key(group, seed);
  for (int64_t e = begin; e < end; ++e) {
    const int64_t bit = code_bit(e, n, bits);
    const float value = decode((codes[bit / 8] >> (bit % 8)) & mask, range);
    y[e] = round_to<T>(value, T::scalar == Scalar::f32 ? 0 : dither_bits(key, e));
  }
}

}  // namespace
}  // namespace quantize::activation
