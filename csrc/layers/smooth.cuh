// Derivatives of smooth functions on the device, a 16-byte vector a thread.
#pragma once

#include "../core/grid.h"
#include "../core/warp.cuh"
#include "smooth.h"

namespace quantize::layers {

struct SmoothTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
};

// vectors: whole ones of 16 bytes, if x and y are aligned for them; else 0.
template <typename T, Smooth function>
__global__ void __launch_bounds__(SmoothTraits::threads) smooth_kernel(const T* __restrict__ x, int64_t n, int64_t vectors, T* y) {
  constexpr int V = VectorTraits<T>::elements;
  const int64_t step = int64_t(gridDim.x) * blockDim.x, thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < vectors; i += step) {
    const uint4 vector = reinterpret_cast<const uint4*>(x)[i];
    float values[V];
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = smooth_derivative<function>(vector_element<T>(vector, e));
    reinterpret_cast<uint4*>(y)[i] = pack_vector<T>(values);
  }
  for (int64_t e = vectors * V + thread; e < n; e += step) y[e] = round_nearest(smooth_derivative<function>(to_float_device(x[e])), T{});
}

template <typename T, typename Launcher>
void launch_smooth(Smooth function, const T* x, int64_t n, T* y, Launcher& launch) {
  constexpr int V = VectorTraits<T>::elements;
  const int64_t vectors = is_aligned(x, 16) && is_aligned(y, 16) ? n / V : 0;
  const dim3 grid(unsigned(grid_size(launch.processors(), SmoothTraits::blocks, n, SmoothTraits::threads * V)));
  const auto run = [&]<Smooth f>() { launch(smooth_kernel<T, f>, grid, SmoothTraits::threads, x, n, vectors, y); };
  switch (function) {
    case Smooth::silu:
      return run.template operator()<Smooth::silu>();
    case Smooth::hardswish:
      return run.template operator()<Smooth::hardswish>();
    case Smooth::mish:
      return run.template operator()<Smooth::mish>();
    case Smooth::gelu:
      return run.template operator()<Smooth::gelu>();
    case Smooth::gelu_tanh:
      return run.template operator()<Smooth::gelu_tanh>();
  }
}

}  // namespace quantize::layers
