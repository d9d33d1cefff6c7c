// dorefa on the device: half a warp a piece, whose sixteen lanes are the CPU's sixteen partial sums, and one warp that joins the pieces in
// the CPU's order: the same bits.
#pragma once

#include "binary.cuh"
#include "diffq.cuh"
#include "dorefa.h"

namespace quantize::weight {

// body(first element, elements, piece, whether it is there) for the half-warps' pieces.
template <typename Body>
QUANTIZE_DEVICE void for_device_pieces(int64_t n, const Body& body) {
  for_items((n + dorefa_piece - 1) / dorefa_piece, [&](int64_t piece, bool there) {
    const int64_t first = piece * dorefa_piece, left = n - first;
    body(first, left < dorefa_piece ? left : dorefa_piece, piece, there && threadIdx.x % ChannelTraits::lanes == 0);
  });
}

// parts: [pieces]: of |w|, the largest or the sum; NaN if any is NaN or infinite.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    dorefa_magnitudes(const T* __restrict__ w, int64_t n, bool wants_largest, float* parts) {
  for_device_pieces(n, [&](int64_t first, int64_t count, int64_t piece, bool writes) {
    float high = 0.f, poison = 0.f, total = 0.f;
    for (int64_t i = threadIdx.x % ChannelTraits::lanes; i < count; i += ChannelTraits::lanes) {
      const float v = to_float_device(w[first + i]), m = magnitude_of(v);
      high = m > high ? m : high, total += m, poison += v * 0.f;
    }
    const float largest = channel_max(high), sum = channel_sum(total), bad = channel_sum(poison);
    if (writes) parts[piece] = (wants_largest ? largest : sum) + bad;
  });
}

// parts: [pieces, 4]: sums of the distances from the first weight, of their squares, and of the levels' likewise.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    dorefa_spreads(const T* __restrict__ w, int64_t n, float levels, const float* stats, float* parts) {
  const float half = dorefa_half(stats[1]), first_weight = to_float_device(w[0]);
  const float first_level = dorefa_level(tanh_near(first_weight), half, levels, 0.f);
  for_device_pieces(n, [&](int64_t first, int64_t count, int64_t piece, bool writes) {
    float sums[4] = {};
    for (int64_t i = threadIdx.x % ChannelTraits::lanes; i < count; i += ChannelTraits::lanes) {
      const float v = to_float_device(w[first + i]), d = v - first_weight;
      const float e = dorefa_level(tanh_near(v), half, levels, 0.f) - first_level;
      sums[0] += d, sums[1] += d * d, sums[2] += e, sums[3] += e * e;
    }
    for (int s = 0; s < 4; ++s) {
      const float sum = channel_sum(sums[s]);
      if (writes) parts[4 * piece + s] = sum;
    }
  });
}

// parts: [pieces, 2]: sum(g t), and how many |w| are the largest.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    dorefa_products(const T* __restrict__ grad, const T* __restrict__ w, int64_t n, const float* stats, float* parts) {
  const float largest = stats[0];
  for_device_pieces(n, [&](int64_t first, int64_t count, int64_t piece, bool writes) {
    float product = 0.f, many = 0.f;
    for (int64_t i = threadIdx.x % ChannelTraits::lanes; i < count; i += ChannelTraits::lanes) {
      const float v = to_float_device(w[first + i]);
      product += to_float_device(grad[first + i]) * tanh_near(v), many += magnitude_of(v) == largest ? 1.f : 0.f;
    }
    const float products = channel_sum(product), counts = channel_sum(many);
    if (writes) parts[2 * piece] = products, parts[2 * piece + 1] = counts;
  });
}

// Sum of parts[stride * p] over the pieces, in every lane of the one warp.
QUANTIZE_DEVICE double join_pieces(const float* parts, int64_t pieces, int stride) {
  double total = 0;
  for (int64_t p = threadIdx.x % binary_sums; p < pieces; p += binary_sums) total += double(parts[p * stride]);
  for (int mask = binary_sums / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(Warp::all, total, mask);
  return total;
}

// One bit: scale = mean |w|.
[[maybe_unused]] static __global__ void __launch_bounds__(Warp::lanes)
    dorefa_mean(const float* parts, int64_t pieces, int64_t n, float* scale, float* stats) {
  const double total = join_pieces(parts, pieces, 1);
  if (threadIdx.x == 0) *scale = float(total / double(n)), stats[0] = stats[1] = 0.f, stats[2] = 1.f;
}

[[maybe_unused]] static __global__ void __launch_bounds__(Warp::lanes)
    dorefa_largest(const float* parts, int64_t pieces, float levels, float* scale, float* stats) {
  float high = 0.f, poison = 0.f;
  for (int64_t p = threadIdx.x % ChannelTraits::lanes; p < pieces; p += ChannelTraits::lanes)
    high = parts[p] > high ? parts[p] : high, poison += parts[p] * 0.f;
  const float largest = channel_max(high) + channel_sum(poison);
  if (threadIdx.x != 0) return;
  stats[0] = largest, stats[1] = tanh_near(largest), stats[2] = largest == largest ? 1.f : largest;
  *scale = stats[2] / levels;
}

[[maybe_unused]] static __global__ void __launch_bounds__(Warp::lanes)
    dorefa_adjust(const float* parts, int64_t pieces, int64_t n, float levels, float* scale, float* stats) {
  double sums[4];
  for (int s = 0; s < 4; ++s) sums[s] = join_pieces(parts + s, pieces, 4);
  if (threadIdx.x != 0) return;
  const float adjustment = dorefa_adjustment({sums[0], sums[1]}, {sums[2], sums[3]}, n, levels);
  stats[2] = stats[0] == stats[0] ? adjustment : stats[0];
  *scale = stats[2] / levels;
}

[[maybe_unused]] static __global__ void __launch_bounds__(Warp::lanes)
    dorefa_slopes(const float* parts, int64_t pieces, const float* stats, DorefaSlope* slope) {
  const double total = join_pieces(parts, pieces, 2), many = join_pieces(parts + 1, pieces, 2);
  if (threadIdx.x == 0) *slope = dorefa_slope({stats[0], stats[1], stats[2]}, total, many);
}

// levels 0: one bit.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    dorefa_elements(const T* __restrict__ w, int64_t n, float levels, const float* scale, const float* stats, T* y) {
  const float half = dorefa_half(stats[1]), step_size = *scale;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const float v = to_float_device(w[i]), sign = v < 0.f ? 0.f - step_size : step_size;
    y[i] = round_nearest(levels == 0.f ? sign : dorefa_level(tanh_near(v), half, levels, 0.f) * step_size, T{});
  }
}

template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    dorefa_gradients(const T* __restrict__ grad, const T* __restrict__ w, int64_t n, const DorefaSlope* slope, T* out) {
  const DorefaSlope own = *slope;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    out[i] = round_nearest(dorefa_gradient(to_float_device(grad[i]), to_float_device(w[i]), own), T{});
}

// A warp a part of a sample: the largest |g|, as the bits of a float. parts: [samples, count].
constexpr int64_t gradient_part = 8192;

template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    gradient_parts(const T* __restrict__ g, int64_t samples, int64_t elements, int64_t count, uint32_t* parts) {
  constexpr int warps = ChannelTraits::threads / Warp::lanes;
  for (int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / Warp::lanes; item < samples * count; item += int64_t(gridDim.x) * warps) {
    const int64_t first = item % count * gradient_part, end = first + gradient_part < elements ? first + gradient_part : elements;
    const T* own = g + item / count * elements;
    uint32_t high = 0;
    for (int64_t i = first + threadIdx.x % Warp::lanes; i < end; i += Warp::lanes) {
      const uint32_t m = float_bits(to_float_device(own[i])) & 0x7fffffffu;  // NaN is above infinity
      high = m > high ? m : high;
    }
    for (int mask = Warp::lanes / 2; mask > 0; mask /= 2) {
      const uint32_t other = __shfl_xor_sync(Warp::all, high, mask);
      high = other > high ? other : high;
    }
    if (threadIdx.x % Warp::lanes == 0) parts[item] = high;
  }
}

[[maybe_unused]] static __global__ void __launch_bounds__(ChannelTraits::threads)
    gradient_grids(const uint32_t* parts, int64_t samples, int64_t count, float levels, GradientGrid* grids) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t sample = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; sample < samples; sample += step) {
    uint32_t high = 0;
    for (int64_t c = 0; c < count; ++c) high = parts[sample * count + c] > high ? parts[sample * count + c] : high;
    grids[sample] = gradient_grid(bits_float(high < 0x7f800000u ? high : 0x7fc00000u), levels);
  }
}

template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads)
    round_gradients(DiffQTensor t, const T* __restrict__ g, int64_t elements, const GradientGrid* __restrict__ grids, float levels, T* y) {
  for (int64_t piece = blockIdx.x; piece * DiffQTraits::piece < t.n; piece += gridDim.x)
    for_noise(t, piece, [&](int64_t i, float noise) {
      const GradientGrid grid = grids[t.n <= 0xffffffffll ? int64_t(uint32_t(i) / uint32_t(elements)) : i / elements];
      y[i] = round_nearest(dorefa_level(to_float_device(g[i]), grid.half, levels, noise) * grid.unit, T{});
    });
}

template <typename Launcher>
dim3 dorefa_blocks(const Launcher& launch, int64_t items, int64_t per_block) {
  return dim3(unsigned(grid_size(launch.processors(), ChannelTraits::blocks, items, per_block)));
}

template <typename T, typename Launcher>
void launch_dorefa(const T* w, int64_t n, int bits, bool adjusted, T* y, float* scale, float* stats, Launcher& launch) {
  const int64_t pieces = (n + dorefa_piece - 1) / dorefa_piece;
  const dim3 by_piece = dorefa_blocks(launch, pieces, ChannelTraits::channels), one(1);
  const float levels = bits == 1 ? 0.f : float((1 << bits) - 1);
  float* parts = launch.template scratch<float>(4 * pieces);
  const float* sums = parts;
  const float* known = stats;
  launch(dorefa_magnitudes<T>, by_piece, ChannelTraits::threads, w, n, bits > 1, parts);
  if (bits == 1) {
    launch(dorefa_mean, one, Warp::lanes, sums, pieces, n, scale, stats);
  } else {
    launch(dorefa_largest, one, Warp::lanes, sums, pieces, levels, scale, stats);
    if (adjusted) {
      launch(dorefa_spreads<T>, by_piece, ChannelTraits::threads, w, n, levels, known, parts);
      launch(dorefa_adjust, one, Warp::lanes, sums, pieces, n, levels, scale, stats);
    }
  }
  launch(dorefa_elements<T>, dorefa_blocks(launch, n, ChannelTraits::threads), ChannelTraits::threads, w, n, levels,
         static_cast<const float*>(scale), known, y);
}

template <typename T, typename Launcher>
void launch_dorefa_backward(const T* grad, const T* w, int64_t n, const float* stats, T* out, Launcher& launch) {
  const int64_t pieces = (n + dorefa_piece - 1) / dorefa_piece;
  float* parts = launch.template scratch<float>(2 * pieces);
  DorefaSlope* slope = launch.template scratch<DorefaSlope>(1);
  launch(dorefa_products<T>, dorefa_blocks(launch, pieces, ChannelTraits::channels), ChannelTraits::threads, grad, w, n, stats, parts);
  launch(dorefa_slopes, dim3(1), Warp::lanes, static_cast<const float*>(parts), pieces, stats, slope);
  launch(dorefa_gradients<T>, dorefa_blocks(launch, n, ChannelTraits::threads), ChannelTraits::threads, grad, w, n,
         static_cast<const DorefaSlope*>(slope), out);
}

template <typename T, typename Launcher>
void launch_gradient(const T* g, int64_t n, int64_t elements, int bits, Seed seed, T* y, Launcher& launch) {
  const int64_t samples = n / elements, count = (elements + gradient_part - 1) / gradient_part;
  const float levels = float((1 << bits) - 1);
  uint32_t* parts = launch.template scratch<uint32_t>(samples * count);
  GradientGrid* grids = launch.template scratch<GradientGrid>(samples);
  DiffQTensor t{};
  t.n = n, t.seed = seed;
  launch(gradient_parts<T>, dorefa_blocks(launch, samples * count, ChannelTraits::threads / Warp::lanes), ChannelTraits::threads, g,
         samples, elements, count, parts);
  launch(gradient_grids, dorefa_blocks(launch, samples, ChannelTraits::threads), ChannelTraits::threads,
         static_cast<const uint32_t*>(parts), samples, count, levels, grids);
  launch(round_gradients<T>, dorefa_blocks(launch, n, DiffQTraits::piece), DiffQDeviceTraits::threads, t, g, elements,
         static_cast<const GradientGrid*>(grids), levels, y);
}

}  // namespace quantize::weight
