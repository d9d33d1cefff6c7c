// Sharing a budget of bits on the device: keys, a sort in between, and the walk through the sorted upgrades.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/warp.cuh"
#include "allocate_bits.h"

namespace quantize::activation {

struct AllocateTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
  // The walk is one thread's, each step waiting for the one before: from shared memory where all fits.
  static constexpr int shared_samples = 4096, shared_upgrades = UpgradeTraits::count * shared_samples;
  static constexpr int budgets = 16;  // of a launch
  static_assert(shared_upgrades <= 65536 && shared_upgrades * 2 + shared_samples + threads * 8 <= 48 * 1024);
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

// The levels of all samples, which a block finds together. order: int64 [3 * samples], upgrades by falling key. far: uint8 [samples], for
// the levels where they are too many for the block's own memory.
QUANTIZE_DEVICE const uint8_t* find_levels(const int64_t* __restrict__ order, int64_t samples, int64_t bits_left, int max_bits,
                                           uint8_t* far) {
  __shared__ uint16_t near_order[AllocateTraits::shared_upgrades];
  __shared__ uint8_t near_level[AllocateTraits::shared_samples];
  const int64_t upgrades = UpgradeTraits::count * samples;
  const bool near = samples <= AllocateTraits::shared_samples;
  uint8_t* level = near ? near_level : far;
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) level[n] = 0;
  for (int64_t i = threadIdx.x; near && i < upgrades; i += blockDim.x) near_order[i] = uint16_t(order[i]);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (near)
      take_upgrades(near_order, upgrades, bits_left, max_bits, near_level);
    else
      take_upgrades(order, upgrades, bits_left, max_bits, far);
  }
  __syncthreads();
  return level;
}

// One block. bits: uint8 [samples]; holds the levels on the way if there are many.
[[maybe_unused]] static __global__ void __launch_bounds__(AllocateTraits::threads)
    take_upgrades_kernel(const int64_t* __restrict__ order, int64_t samples, int64_t bits_left, int max_bits, uint8_t* bits) {
  const uint8_t* level = find_levels(order, samples, bits_left, max_bits, bits);
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) bits[n] = uint8_t(1 << level[n]);
}

struct CurveBudgets {
  int64_t of[AllocateTraits::budgets];  // curve_budget's
};

// A block a budget. cost: float32 [samples, 4]. far: uint8 [budgets, samples]. curve: float32 [budgets], what the levels cost together.
[[maybe_unused]] static __global__ void __launch_bounds__(AllocateTraits::threads)
    curve_kernel(const int64_t* __restrict__ order, const float* __restrict__ cost, int64_t samples, CurveBudgets budgets, int max_bits,
                 uint8_t* far, float* curve) {
  __shared__ double sums[AllocateTraits::threads];
  const int64_t budget = budgets.of[blockIdx.x];
  if (budget == 0) {
    if (threadIdx.x == 0) curve[blockIdx.x] = 0.f;
    return;
  }
  const uint8_t* level = find_levels(order, samples, budget - samples, max_bits, far + blockIdx.x * samples);
  double sum = 0;
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) sum += double(cost[4 * n + level[n]]);
  sums[threadIdx.x] = sum;
  for (int half = AllocateTraits::threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) curve[blockIdx.x] = float(sums[0]);
}

template <typename Launcher>
void launch_curve(const int64_t* order, const float* cost, int64_t samples, const std::vector<int64_t>& budgets, int max_bits, float* curve,
                  Launcher& launch) {
  uint8_t* far = launch.template scratch<uint8_t>(samples * AllocateTraits::budgets);
  for (size_t first = 0; first < budgets.size(); first += AllocateTraits::budgets) {
    const size_t count = std::min<size_t>(AllocateTraits::budgets, budgets.size() - first);
    CurveBudgets own{};
    std::copy_n(budgets.begin() + first, count, own.of);
    launch(curve_kernel, dim3(unsigned(count)), AllocateTraits::threads, order, cost, samples, own, max_bits, far, curve + first);
  }
}

}  // namespace quantize::activation
