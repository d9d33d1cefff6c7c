// Sharing a budget of bits on the device: keys, a sort in between, and the walk through the sorted upgrades.
#pragma once

#include "../core/warp.cuh"
#include "allocate_bits.h"

namespace quantize::activation {

struct AllocateTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
  // The walk is one thread's, each step waiting for the one before: from shared memory where all fits.
  static constexpr int shared_samples = 4096, shared_upgrades = UpgradeTraits::count * shared_samples;
  static_assert(shared_upgrades <= 65536 && shared_upgrades * 2 + shared_samples <= 48 * 1024);
};

// variance: float32 [samples, 4]. keys: float32 [samples, 3].
[[maybe_unused]] static __global__ void __launch_bounds__(AllocateTraits::threads)
    upgrade_keys_kernel(const float* __restrict__ variance, int64_t samples, int max_bits, float* keys) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < samples; n += step) {
    float own[4], key[UpgradeTraits::count];
    for (int b = 0; b < 4; ++b) own[b] = variance[4 * n + b];
    upgrade_keys(own, max_bits, key);
    for (int k = 0; k < UpgradeTraits::count; ++k) keys[UpgradeTraits::count * n + k] = key[k];
  }
}

// One block. order: int64 [3 * samples], upgrades by falling key. bits: uint8 [samples]; holds the levels on the way if there are many.
[[maybe_unused]] static __global__ void __launch_bounds__(AllocateTraits::threads)
    take_upgrades_kernel(const int64_t* __restrict__ order, int64_t samples, int64_t bits_left, int max_bits, uint8_t* bits) {
  __shared__ uint16_t near_order[AllocateTraits::shared_upgrades];
  __shared__ uint8_t near_level[AllocateTraits::shared_samples];
  const int64_t upgrades = UpgradeTraits::count * samples;
  const bool near = samples <= AllocateTraits::shared_samples;
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) (near ? near_level : bits)[n] = 0;
  for (int64_t i = threadIdx.x; near && i < upgrades; i += blockDim.x) near_order[i] = uint16_t(order[i]);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (near)
      take_upgrades(near_order, upgrades, bits_left, max_bits, near_level);
    else
      take_upgrades(order, upgrades, bits_left, max_bits, bits);
  }
  __syncthreads();
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) bits[n] = uint8_t(1 << (near ? near_level : bits)[n]);
}

}  // namespace quantize::activation
