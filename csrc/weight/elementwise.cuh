// Element by element on the device: rounding to powers of two, and the learned step.
#pragma once

#include "../core/grid.h"
#include "../core/warp.cuh"
#include "lsq.h"
#include "power_of_two.h"

namespace quantize::weight {

struct ElementTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
  static constexpr int sums = 1024;                // partial sums of the step's gradient: blocks of a fixed number, so that runs agree
};

template <typename T>
__global__ void __launch_bounds__(ElementTraits::threads) round_elements(const T* __restrict__ x, int64_t n, bool plus, T* y) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) y[i] = round_power_of_two(x[i], plus);
}

// step, zero_point: device scalars.
template <typename T>
__global__ void __launch_bounds__(ElementTraits::threads)
    lsq_elements(const T* __restrict__ x, int64_t n, const float* step_size, const float* zero_point, int levels, T* y) {
  const LsqRange range = lsq_range(*step_size, *zero_point, levels);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    y[i] = round_nearest(lsq_clip(lsq_round(lsq_divide(to_float_device(x[i]), range)), range) * range.step, T{});
}

// grad_x as lsq_kernels.h has it. sums[block]: this block's part of the step's gradient.
template <typename T>
__global__ void __launch_bounds__(ElementTraits::threads)
    lsq_gradients(const T* __restrict__ grad, const T* __restrict__ x, int64_t n, const float* step_size, const float* zero_point,
                  int levels, T* grad_x, float* sums) {
  const LsqRange range = lsq_range(*step_size, *zero_point, levels);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  float sum = 0.f;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const float own = to_float_device(grad[i]), v = lsq_divide(to_float_device(x[i]), range);
    const float rounded = lsq_round(v), clipped = lsq_clip(rounded, range);
    const bool inside = v >= range.low && v <= range.high;
    sum += own * (inside ? rounded - v : clipped);
    grad_x[i] = inside ? grad[i] : round_nearest(clipped - clipped, T{});  // 0, or NaN
  }
  __shared__ float warps[ElementTraits::threads / Warp::lanes];
  for (int mask = Warp::lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(Warp::all, sum, mask);
  if (threadIdx.x % Warp::lanes == 0) warps[threadIdx.x / Warp::lanes] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (float part : warps) total += part;
    sums[blockIdx.x] = total;
  }
}

}  // namespace quantize::weight
