// Counter-based random numbers: Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Seven rounds: the paper's smallest count that passes BigCrush ("crush-resistant"); ten is its safety margin for users who pick
// adversarial counters, and costs 40 % more. The same inline function serves the CPU and CUDA, so both draw the same numbers.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace quantize {

struct PhiloxTraits {
  static constexpr int rounds = 7;
  static constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
};

// What a stochastic op needs to be reproducible. `seed` is the key, `offset` the upper half of the counter.
struct Seed {
  uint64_t seed = 0;
  uint64_t offset = 0;
};

struct Philox4 {
  uint32_t word[4];
};

QUANTIZE_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // nvcc takes the plain expression for a product of 64-bit numbers and adds up zeros
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

QUANTIZE_HOST_DEVICE Philox4 philox4x32(uint32_t counter0, uint32_t counter1, Seed seed) {
  using T = PhiloxTraits;
  uint32_t c0 = counter0, c1 = counter1, c2 = uint32_t(seed.offset), c3 = uint32_t(seed.offset >> 32);
  uint32_t k0 = uint32_t(seed.seed), k1 = uint32_t(seed.seed >> 32);
  for (int round = 0; round < T::rounds; ++round) {
    const uint64_t p0 = wide_product(T::multiplier0, c0), p1 = wide_product(T::multiplier1, c2);
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = uint32_t(p1), c2 = n2, c3 = uint32_t(p0);
    k0 += T::weyl0, k1 += T::weyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Counters that differ in their first word alone share a product of each of the first two rounds:
//   (high, low) = wide_product(multiplier0, word 0), c2 = high ^ second, (next, c1) = wide_product(multiplier1, c2),
//   c0 = next ^ first_after, c2 = low ^ second_after, c3 = last.
struct PhiloxStart {
  uint32_t second, first_after, second_after, last;
};

QUANTIZE_HOST_DEVICE PhiloxStart philox_start(uint32_t counter1, Seed seed) {
  using T = PhiloxTraits;
  const uint32_t k0 = uint32_t(seed.seed), k1 = uint32_t(seed.seed >> 32);
  const uint64_t p1 = wide_product(T::multiplier1, uint32_t(seed.offset));
  const uint64_t p0 = wide_product(T::multiplier0, uint32_t(p1 >> 32) ^ counter1 ^ k0);
  return {uint32_t(seed.offset >> 32) ^ k1, uint32_t(p1) ^ (k0 + T::weyl0), uint32_t(p0 >> 32) ^ (k1 + T::weyl1), uint32_t(p0)};
}

// A cheap 32-bit mix (the constants are Wellons' "lowbias32"), for dither far below the quantization noise.
QUANTIZE_HOST_DEVICE uint32_t hash32(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace quantize
