// One bit an element, made with a clip or from booleans, and applied to a gradient.
#pragma once

#include "../core/grid.h"
#include "../core/warp.cuh"
#include "group_lanes.h"
#include "sign_mask_kernels.h"

namespace quantize::activation {

// A warp works on a tile of 1024 elements, a 16-byte load a lane and row, and writes the tile's mask as one 32-bit word a lane.
struct MaskTraits {
  static constexpr int threads = 256, warps = threads / Warp::lanes, blocks = 8;  // blocks: of a multiprocessor
  static constexpr int tile = 1024, tile_bytes = tile / 8, tile_words = tile / 32;
  static constexpr int booleans = 16;  // of one load in pack_mask
  static_assert(tile_words == Warp::lanes);
};

// Rows of a tile, and how their bits become words of the mask: a lane holds V bits of each row, so the lanes that share a word, 32/V of
// them, exchange the fields of a register of V-bit fields.
template <typename T>
struct MaskLanes {
  static constexpr int V = VectorTraits<T>::elements, rows = MaskTraits::tile / (Warp::lanes * V), sharing = 32 / V;
  static_assert(rows == sharing);
  static constexpr int word(int lane) { return lane % sharing * (Warp::lanes / sharing) + lane / sharing; }

  // From the lane's bits, row by row, to its word; its own inverse.
  QUANTIZE_DEVICE static uint32_t exchange(uint32_t bits, int lane) {
    static_for<(V == 4 ? 3 : 2)>([&]<int s>() {
      constexpr int mask = 1 << s;
      bits = exchange_fields<V * mask>(bits, __shfl_xor_sync(Warp::all, bits, mask), (lane & mask) != 0);
    });
    return bits;
  }
};

// x, y: [n], perhaps the same memory. mask: [ceil(n/8)] bytes. tiles: whole ones, if x, y and mask are aligned for them; else 0.
template <typename T>
__global__ void __launch_bounds__(MaskTraits::threads)
    clip_mask_kernel(const T* x, int64_t n, int64_t tiles, Clip clip, T* y, uint8_t* mask) {
  using L = MaskLanes<T>;
  const int lane = threadIdx.x % Warp::lanes;
  const int64_t warp = int64_t(blockIdx.x) * MaskTraits::warps + threadIdx.x / Warp::lanes;
  for (int64_t tile = warp; tile < tiles; tile += int64_t(gridDim.x) * MaskTraits::warps) {
    const uint4* source = reinterpret_cast<const uint4*>(x + tile * MaskTraits::tile) + lane;
    uint4* target = reinterpret_cast<uint4*>(y + tile * MaskTraits::tile) + lane;
    uint4 vectors[L::rows];
#pragma unroll
    for (int row = 0; row < L::rows; ++row) vectors[row] = source[row * Warp::lanes];
    uint32_t bits = 0;
#pragma unroll
    for (int row = 0; row < L::rows; ++row) {
      float values[L::V];
#pragma unroll
      for (int i = 0; i < L::V; ++i) {
        const float value = vector_element<T>(vectors[row], i);
        bits |= uint32_t(clip_passes(value, clip)) << (row * L::V + i);
        values[i] = clip_value(value, clip);
      }
      target[row * Warp::lanes] = pack_vector<T>(values);
    }
    reinterpret_cast<uint32_t*>(mask + tile * MaskTraits::tile_bytes)[L::word(lane)] = L::exchange(bits, lane);
  }
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t byte = tiles * MaskTraits::tile_bytes + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; byte < mask_bytes(n); byte += step) {
    uint32_t bits = 0;
    for (int64_t e = 8 * byte; e < 8 * byte + 8 && e < n; ++e) {
      const float value = to_float(x[e]);
      bits |= uint32_t(clip_passes(value, clip)) << (e - 8 * byte);
      y[e] = round_nearest(clip_value(value, clip), T{});
    }
    mask[byte] = uint8_t(bits);
  }
}

// grad, out: [n]. mask: [ceil(n/8)] bytes. tiles as above.
template <typename T>
__global__ void __launch_bounds__(MaskTraits::threads)
    apply_mask_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ mask, int64_t n, int64_t tiles, float on, float off, T* out) {
  using L = MaskLanes<T>;
  const int lane = threadIdx.x % Warp::lanes;
  const int64_t warp = int64_t(blockIdx.x) * MaskTraits::warps + threadIdx.x / Warp::lanes;
  for (int64_t tile = warp; tile < tiles; tile += int64_t(gridDim.x) * MaskTraits::warps) {
    const uint4* source = reinterpret_cast<const uint4*>(grad + tile * MaskTraits::tile) + lane;
    uint4* target = reinterpret_cast<uint4*>(out + tile * MaskTraits::tile) + lane;
    uint4 vectors[L::rows];
#pragma unroll
    for (int row = 0; row < L::rows; ++row) vectors[row] = source[row * Warp::lanes];
    const uint32_t word = reinterpret_cast<const uint32_t*>(mask + tile * MaskTraits::tile_bytes)[L::word(lane)];
    const uint32_t bits = L::exchange(word, lane);
#pragma unroll
    for (int row = 0; row < L::rows; ++row) {
      float values[L::V];
#pragma unroll
      for (int i = 0; i < L::V; ++i) values[i] = masked_value(vector_element<T>(vectors[row], i), bits >> (row * L::V + i) & 1, on, off);
      target[row * Warp::lanes] = pack_vector<T>(values);
    }
  }
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t e = tiles * MaskTraits::tile + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < n; e += step)
    out[e] = round_nearest(masked_value(to_float(grad[e]), mask[e / 8] >> (e % 8) & 1, on, off), T{});
}

// source: [n] booleans, a byte each of value 0 or 1. mask: [ceil(n/8)] bytes. vectors: whole ones of 16, if both are aligned; else 0.
[[maybe_unused]] static __global__ void __launch_bounds__(MaskTraits::threads)
    pack_mask_kernel(const uint8_t* __restrict__ source, int64_t n, int64_t vectors, uint8_t* mask) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < vectors; i += step) {
    const uint4 v = reinterpret_cast<const uint4*>(source)[i];
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= vector_word(v, w) * 0x10204080u >> 28 << (4 * w);  // each byte's lowest bit, in order
    reinterpret_cast<uint16_t*>(mask)[i] = uint16_t(bits);
  }
  for (int64_t byte = vectors * (MaskTraits::booleans / 8) + thread; byte < mask_bytes(n); byte += step) {
    uint32_t bits = 0;
    for (int64_t e = 8 * byte; e < 8 * byte + 8 && e < n; ++e) bits |= uint32_t(source[e]) << (e - 8 * byte);
    mask[byte] = uint8_t(bits);
  }
}

inline dim3 mask_grid(int processors, int64_t items, int64_t per_block) {
  return dim3(unsigned(grid_size(processors, MaskTraits::blocks, items, per_block)));
}

template <typename T, typename Launcher>
void launch_clip_mask(const T* x, int64_t n, Clip clip, T* y, uint8_t* mask, Launcher& launch) {
  const int64_t tiles = is_aligned(x, 16) && is_aligned(y, 16) && is_aligned(mask, 4) ? n / MaskTraits::tile : 0;
  launch(clip_mask_kernel<T>, mask_grid(launch.processors(), mask_bytes(n), MaskTraits::warps * MaskTraits::tile_bytes),
         MaskTraits::threads, x, n, tiles, clip, y, mask);
}

template <typename T, typename Launcher>
void launch_apply_mask(const T* grad, const uint8_t* mask, int64_t n, float on, float off, T* out, Launcher& launch) {
  const int64_t tiles = is_aligned(grad, 16) && is_aligned(out, 16) && is_aligned(mask, 4) ? n / MaskTraits::tile : 0;
  launch(apply_mask_kernel<T>, mask_grid(launch.processors(), mask_bytes(n), MaskTraits::warps * MaskTraits::tile_bytes),
         MaskTraits::threads, grad, mask, n, tiles, on, off, out);
}

template <typename Launcher>
void launch_pack_mask(const uint8_t* source, int64_t n, uint8_t* mask, Launcher& launch) {
  const int64_t vectors = is_aligned(source, 16) && is_aligned(mask, 2) ? n / MaskTraits::booleans : 0;
  launch(pack_mask_kernel, mask_grid(launch.processors(), n, MaskTraits::threads * MaskTraits::booleans), MaskTraits::threads, source, n,
         vectors, mask);
}

}  // namespace quantize::activation
