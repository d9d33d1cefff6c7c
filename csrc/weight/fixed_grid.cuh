// fixed_grid on the device: a warp takes 32 elements at a time and writes what is kept of them as whole bytes.
#pragma once

#include "../core/grid.h"
#include "../core/warp.cuh"
#include "fixed_grid.h"

namespace quantize::weight {

struct FixedGridTraits {
  static constexpr int threads = 256, warps = threads / Warp::lanes,
                       blocks = 8;  // blocks: of a multiprocessor
};

// body(element, whether it is there): warps stay whole.
template <typename Body>
QUANTIZE_DEVICE void for_warps(int64_t n, const Body& body) {
  const int lane = threadIdx.x % Warp::lanes;
  const int64_t warp = int64_t(blockIdx.x) * FixedGridTraits::warps + threadIdx.x / Warp::lanes;
  for (int64_t first = warp * Warp::lanes; first < n; first += int64_t(gridDim.x) * FixedGridTraits::threads)
    body(first + lane, first + lane < n);
}

// A bit of each lane; every eighth lane writes a byte.
QUANTIZE_DEVICE void keep_bit(bool bit, int64_t i, bool there, uint8_t* kept) {
  const uint32_t bits = __ballot_sync(Warp::all, bit && there);
  if (there && i % 8 == 0) kept[i / 8] = uint8_t(bits >> (threadIdx.x % Warp::lanes));
}

template <typename T>
__global__ void __launch_bounds__(FixedGridTraits::threads) sign_elements(const T* __restrict__ x, int64_t n, T* y, uint8_t* kept) {
  for_warps(n, [&](int64_t i, bool there) {
    const float v = there ? to_float_device(x[i]) : 0.f;
    if (there) y[i] = round_nearest(sign_of(v), T{});
    keep_bit(sign_passes(v), i, there, kept);
  });
}

template <typename T>
__global__ void __launch_bounds__(FixedGridTraits::threads)
    sign_polynomial_elements(const T* __restrict__ x, int64_t n, T* y, uint8_t* kept) {
  for_warps(n, [&](int64_t i, bool there) {
    const float v = there ? to_float_device(x[i]) : 0.f;
    if (there) y[i] = round_nearest(sign_of(v), T{});
    const int code = there ? sign_slope_code(v) : 0, next = __shfl_xor_sync(Warp::all, code, 1);
    if (there && i % 2 == 0) kept[i / 2] = uint8_t(code | next << 4);
  });
}

template <typename T>
__global__ void __launch_bounds__(FixedGridTraits::threads)
    unit_elements(const T* __restrict__ x, int64_t n, int levels, T* y, uint8_t* kept) {
  const LsqRange range = unit_range(levels);
  for_warps(n, [&](int64_t i, bool there) {
    const float v = there ? to_float_device(x[i]) : 0.f;
    if (there) y[i] = round_nearest(lsq_clip(lsq_round(lsq_divide(v, range)), range) * range.step, T{});
    keep_bit(unit_passes(v), i, there, kept);
  });
}

template <typename T>
__global__ void __launch_bounds__(FixedGridTraits::threads)
    grid_gradients(const T* __restrict__ grad, const uint8_t* __restrict__ kept, int64_t n, bool polynomial, T* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    if (polynomial)
      out[i] = round_nearest(to_float_device(grad[i]) * sign_slope(kept[i / 2] >> (i % 2 * 4) & 15), T{});
    else
      out[i] = kept[i / 8] >> (i % 8) & 1 ? grad[i] : round_nearest(0.f, T{});
  }
}

template <typename Launcher>
dim3 fixed_grid_blocks(const Launcher& launch, int64_t n) {
  return dim3(unsigned(grid_size(launch.processors(), FixedGridTraits::blocks, n, FixedGridTraits::threads)));
}

template <typename T, typename Launcher>
void launch_sign(const T* x, int64_t n, bool polynomial, T* y, uint8_t* kept, Launcher& launch) {
  launch(polynomial ? sign_polynomial_elements<T> : sign_elements<T>, fixed_grid_blocks(launch, n), FixedGridTraits::threads, x, n, y,
         kept);
}

template <typename T, typename Launcher>
void launch_unit(const T* x, int64_t n, int levels, T* y, uint8_t* kept, Launcher& launch) {
  launch(unit_elements<T>, fixed_grid_blocks(launch, n), FixedGridTraits::threads, x, n, levels, y, kept);
}

template <typename T, typename Launcher>
void launch_grid_gradients(const T* grad, const uint8_t* kept, int64_t n, bool polynomial, T* out, Launcher& launch) {
  launch(grid_gradients<T>, fixed_grid_blocks(launch, n), FixedGridTraits::threads, grad, kept, n, polynomial, out);
}

}  // namespace quantize::weight
