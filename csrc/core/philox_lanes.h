// Sixteen Philox counters at a time: what philox4x32 gives for each lane.
#pragma once

#include "lanes.h"
#include "philox.h"

namespace quantize {
namespace {

struct Words {  // unsigned, in the registers of Lanes
  using Part = uint32_t __attribute__((vector_size(4 * Lanes::width)));
  Part part[Lanes::parts];
};

struct Product {
  Words::Part high, low;
};

// The two halves of a * b.
QUANTIZE_INLINE Product wide_product(Words::Part a, uint32_t b) {
#if defined(__AVX512F__)
  using Wide = uint64_t __attribute__((vector_size(64)));
  const __m512i factor = (__m512i)(Words::Part{} + b);  // maskz: GCC warns about what the plain intrinsic leaves undefined
  const Wide even = (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, factor),
             odd = (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)((Wide)a >> 32), factor);
  return {(Words::Part)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB),
          (Words::Part)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA)};
#elif defined(__AVX2__)
  using Wide = uint64_t __attribute__((vector_size(32)));
  const __m256i factor = (__m256i)(Words::Part{} + b);
  const Wide even = (Wide)_mm256_mul_epu32((__m256i)a, factor), odd = (Wide)_mm256_mul_epu32((__m256i)((Wide)a >> 32), factor);
  return {(Words::Part)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xaa),
          (Words::Part)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa)};
#else
  Product product;
  for (int i = 0; i < Lanes::width; ++i) {
    const uint64_t p = uint64_t(a[i]) * b;
    product.high[i] = uint32_t(p >> 32), product.low[i] = uint32_t(p);
  }
  return product;
#endif
}

// word[w] of the counters first, first + 1, ..., first + 15; the second counter word is the same for all.
QUANTIZE_INLINE void philox_lanes(uint32_t first, uint32_t second, Seed seed, Words (&word)[4]) {
  using T = PhiloxTraits;
  static constexpr uint32_t numbers[lanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const PhiloxStart start = philox_start(second, seed);
  for (int i = 0; i < Lanes::parts; ++i) {
    Words::Part c0;
    std::memcpy(&c0, numbers + i * Lanes::width, sizeof c0);
    const Product even = wide_product(c0 + first, T::multiplier0), odd = wide_product(even.high ^ start.second, T::multiplier1);
    Words::Part c1 = odd.low, c2 = even.low ^ start.second_after, c3 = Words::Part{} + start.last;
    c0 = odd.high ^ start.first_after;
    uint32_t k0 = uint32_t(seed.seed) + 2 * T::weyl0, k1 = uint32_t(seed.seed >> 32) + 2 * T::weyl1;
    for (int round = 2; round < T::rounds; ++round) {
      const Product p0 = wide_product(c0, T::multiplier0), p1 = wide_product(c2, T::multiplier1);
      c0 = p1.high ^ c1 ^ k0, c2 = p0.high ^ c3 ^ k1;
      c1 = p1.low, c3 = p0.low;
      k0 += T::weyl0, k1 += T::weyl1;
    }
    word[0].part[i] = c0, word[1].part[i] = c1, word[2].part[i] = c2, word[3].part[i] = c3;
  }
}

}  // namespace
}  // namespace quantize
