// clipped_noise on the device, with diffq's noise.
#pragma once

#include "diffq.cuh"

namespace quantize::weight {

// ends: device pointer to low, high, scale. Blocks loop over pieces.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads)
    clip_with_noise_on_device(DiffQTensor t, const T* __restrict__ x, const float* ends, T* y) {
  const float low = ends[0], high = ends[1], scale = ends[2];
  for (int64_t piece = blockIdx.x; piece * DiffQTraits::piece < t.n; piece += gridDim.x)
    for_noise(t, piece, [&](int64_t i, float noise) {
      const float v = to_float_device(x[i]), above = low > v ? low : v;
      y[i] = round_nearest((high < above ? high : above) + noise * scale, T{});
    });
}

// sums: [pieces, 3], as ClippedSums.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads)
    clip_gradients_on_device(DiffQTensor t, const T* __restrict__ grad, const T* __restrict__ x, const float* ends, T* grad_x,
                             float* sums) {
  constexpr int warps = DiffQDeviceTraits::threads / Warp::lanes;
  __shared__ float parts[warps][3];
  const float low = ends[0], high = ends[1];
  for (int64_t piece = blockIdx.x; piece * DiffQTraits::piece < t.n; piece += gridDim.x) {
    float by_noise = 0.f, above = 0.f, below = 0.f;
    for_noise(t, piece, [&](int64_t i, float noise) {
      const float g = to_float_device(grad[i]), v = to_float_device(x[i]);
      const bool is_above = v > high, is_below = v < low;
      by_noise += g * noise, above += is_above ? g : 0.f, below += is_below ? g : 0.f;
      grad_x[i] = is_above || is_below ? round_nearest(0.f, T{}) : grad[i];
    });
    for (int mask = Warp::lanes / 2; mask > 0; mask /= 2) {
      by_noise += __shfl_xor_sync(Warp::all, by_noise, mask);
      above += __shfl_xor_sync(Warp::all, above, mask);
      below += __shfl_xor_sync(Warp::all, below, mask);
    }
    if (threadIdx.x % Warp::lanes == 0) {
      float* own = parts[threadIdx.x / Warp::lanes];
      own[0] = by_noise, own[1] = above, own[2] = below;
    }
    __syncthreads();
    if (threadIdx.x < 3) {
      float sum = 0.f;
      for (int warp = 0; warp < warps; ++warp) sum += parts[warp][threadIdx.x];
      sums[3 * piece + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

}  // namespace quantize::weight
