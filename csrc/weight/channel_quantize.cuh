// channel_quantize on the device: half a warp a channel, whose sixteen lanes are the sixteen partial sums of the CPU's (core/lanes.h),
// joined in the same order: the same bits.
#pragma once

#include "../core/grid.h"
#include "../core/warp.cuh"
#include "channel_quantize.h"

namespace quantize::weight {

struct ChannelTraits {
  static constexpr int threads = 128, lanes = 16, channels = threads / lanes, blocks = 8;  // blocks: of a multiprocessor
  static_assert(Warp::lanes % lanes == 0);
};

QUANTIZE_DEVICE float channel_sum(float value) {
  for (int mask = ChannelTraits::lanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(Warp::all, value, mask);
  return value;
}

QUANTIZE_DEVICE float channel_max(float value) {
  for (int mask = ChannelTraits::lanes / 2; mask > 0; mask /= 2) {
    const float other = __shfl_xor_sync(Warp::all, value, mask);
    value = other > value ? other : value;
  }
  return value;
}

QUANTIZE_DEVICE float magnitude_of(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

// A channel of ternary weights; y: where it goes, if anywhere. Not sound: NaN.
template <typename T>
QUANTIZE_DEVICE ChannelScale ternary_row(const T* row, int64_t n, int lane, bool sound, T* y) {
  float total = 0.f, above = 0.f, count = 0.f;
  for (int64_t i = lane; i < n; i += ChannelTraits::lanes) total += magnitude_of(to_float_device(row[i]));
  const float threshold = ternary_threshold(channel_sum(total), n);
  for (int64_t i = lane; i < n; i += ChannelTraits::lanes) {
    const float m = magnitude_of(to_float_device(row[i]));
    above += m > threshold ? m : 0.f, count += m > threshold ? 1.f : 0.f;
  }
  const float whole = channel_sum(above), kept = channel_sum(count);
  const ChannelScale own = sound ? ternary_scale(whole, kept) : poisoned_channel();
  for (int64_t i = lane; i < n && y; i += ChannelTraits::lanes) {
    const float v = to_float_device(row[i]), q = magnitude_of(v) > threshold ? own.step : 0.f;
    y[i] = round_nearest(!sound ? own.step : v < 0.f ? 0.f - q : q, T{});
  }
  return own;
}

// w, y: [channels, n]. scale, limit: [channels].
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    quantize_channels(const T* __restrict__ w, int64_t channels, int64_t n, Codebook book, T* y, float* scale, float* limit) {
  const int lane = threadIdx.x % ChannelTraits::lanes, slot = threadIdx.x / ChannelTraits::lanes;
  const int64_t rounds = (channels + ChannelTraits::channels - 1) / ChannelTraits::channels;
  for (int64_t round = blockIdx.x; round < rounds; round += gridDim.x) {
    const int64_t channel = round * ChannelTraits::channels + slot;
    const bool there = channel < channels;  // warps stay whole
    const T* row = w + (there ? channel : channels - 1) * n;
    float high = 0.f, poison = 0.f;
    for (int64_t i = lane; i < n; i += ChannelTraits::lanes) {
      const float v = to_float_device(row[i]), m = magnitude_of(v);
      high = m > high ? m : high, poison += v * 0.f;
    }
    const float largest = channel_max(high) + channel_sum(poison);
    if (book.ternary) {
      const ChannelScale own = ternary_row(row, n, lane, largest == largest, there ? y + channel * n : nullptr);
      if (there && lane == 0) scale[channel] = own.scale, limit[channel] = own.limit;
      continue;
    }
    const bool sound = largest == largest && !is_zero_channel(largest, book);
    const float unit = 1.f / largest;
    float best = -1.f, product = 1.f, square = 1.f, ratio = book.ratio[0];
    for (int c = 0; c < book.candidates && book.least_squares; ++c) {
      const float inverse = book.anchor / (largest * book.ratio[c]);
      float products = 0.f, squares = 0.f;
      for (int64_t i = lane; i < n && sound; i += ChannelTraits::lanes) {
        const float v = magnitude_of(to_float_device(row[i])), q = level_of(v * inverse, book);
        products += v * unit * q, squares += q * q;
      }
      const float p = channel_sum(products), s = channel_sum(squares), part = part_explained(p, s);
      if (part > best) best = part, product = p, square = s, ratio = book.ratio[c];
    }
    const ChannelScale own = sound                ? channel_scale(largest, ratio, product, square, book)
                             : largest == largest ? zero_channel()
                                                  : poisoned_channel();
    if (!there) continue;
    for (int64_t i = lane; i < n; i += ChannelTraits::lanes) {
      const float v = to_float_device(row[i]), q = sound ? level_of(magnitude_of(v) * own.inverse, book) * own.step : own.step;
      y[channel * n + i] = round_nearest(sound && v < 0.f ? 0.f - q : q, T{});
    }
    if (lane == 0) scale[channel] = own.scale, limit[channel] = own.limit;
  }
}

// out = grad where |w| <= limit of its channel, else 0. All [channels, n].
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    clip_channels(const T* __restrict__ grad, const T* __restrict__ w, const float* __restrict__ limit, int64_t channels, int64_t n,
                  T* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < channels * n; i += step)
    out[i] = magnitude_of(to_float_device(w[i])) <= limit[i / n] ? grad[i] : round_nearest(0.f, T{});
}

template <typename T, typename Launcher>
void launch_quantize_channels(const T* w, int64_t channels, int64_t n, const Codebook& book, T* y, float* scale, float* limit,
                              Launcher& launch) {
  const auto grid = grid_size(launch.processors(), ChannelTraits::blocks, channels, ChannelTraits::channels);
  launch(quantize_channels<T>, dim3(unsigned(grid)), ChannelTraits::threads, w, channels, n, book, y, scale, limit);
}

template <typename T, typename Launcher>
void launch_clip_channels(const T* grad, const T* w, const float* limit, int64_t channels, int64_t n, T* out, Launcher& launch) {
  const auto grid = grid_size(launch.processors(), ChannelTraits::blocks, channels * n, ChannelTraits::threads);
  launch(clip_channels<T>, dim3(unsigned(grid)), ChannelTraits::threads, grad, w, limit, channels, n, out);
}

}  // namespace quantize::weight
