// binary on the device: half a warp a row or a tap, whose sixteen lanes are the CPU's sixteen partial sums: the same bits.
#pragma once

#include "binary.h"
#include "channel_quantize.cuh"

namespace quantize::weight {

// body(item) for the half-warps' items, whole warps together; beyond the last item for an item that is there, and `there` false.
template <typename Body>
QUANTIZE_DEVICE void for_items(int64_t items, const Body& body) {
  const int slot = threadIdx.x / ChannelTraits::lanes;
  const int64_t rounds = (items + ChannelTraits::channels - 1) / ChannelTraits::channels;
  for (int64_t round = blockIdx.x; round < rounds; round += gridDim.x) {
    const int64_t item = round * ChannelTraits::channels + slot;
    body(item < items ? item : items - 1, item < items);
  }
}

// Sum of value(i) over i < n, in all lanes of the half-warp.
template <typename Value>
QUANTIZE_DEVICE float sixteenth_sums(int64_t n, const Value& value) {
  float total = 0.f;
  for (int64_t i = threadIdx.x % ChannelTraits::lanes; i < n; i += ChannelTraits::lanes) total += value(i);
  return channel_sum(total);
}

// mean: [rows, taps].
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    centre_filters(const T* __restrict__ w, int64_t rows, BinaryShape shape, float* mean) {
  for_items(rows * shape.taps, [&](int64_t item, bool there) {
    const T* own = w + item / shape.taps * shape.elements() + item % shape.taps;
    const float sum = sixteenth_sums(shape.centred ? shape.channels : 0, [&](int64_t i) { return to_float_device(own[i * shape.taps]); });
    if (there && threadIdx.x % ChannelTraits::lanes == 0) mean[item] = sum / float(shape.channels);
  });
}

// scale = mean |c| of each row, and y; without y, the rows' sums of |v|.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    scale_filters(const T* __restrict__ w, int64_t rows, BinaryShape shape, const float* __restrict__ mean, const float* limit,
                  float* scale, T* y) {
  const int64_t n = shape.elements();
  const float bound = y ? *limit : INFINITY;
  for_items(rows, [&](int64_t row, bool there) {
    const T* own = w + row * n;
    const float* means = mean + row * shape.taps;
    const auto centred = [&](int64_t i) { return to_float_device(own[i]) - means[i % shape.taps]; };
    const float sum = sixteenth_sums(n, [&](int64_t i) { return clipped_magnitude(centred(i), bound); }) +
                      sixteenth_sums(n, [&](int64_t i) { return to_float_device(own[i]) * 0.f; });
    const float result = y ? sum / float(n) : sum;
    if (there && threadIdx.x % ChannelTraits::lanes == 0) scale[row] = result;
    for (int64_t i = threadIdx.x % ChannelTraits::lanes; i < n && there && y; i += ChannelTraits::lanes)
      y[row * n + i] = round_nearest(centred(i) < 0.f ? 0.f - result : result, T{});
  });
}

// One warp: the limit from the rows' sums.
[[maybe_unused]] static __global__ void __launch_bounds__(Warp::lanes)
    limit_of_layer(const float* sums, int64_t rows, int64_t n, double share, float* limit) {
  double total = 0;
  for (int64_t row = threadIdx.x % binary_sums; row < rows; row += binary_sums) total += double(sums[row]);
  for (int mask = binary_sums / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(Warp::all, total, mask);
  if (threadIdx.x == 0) *limit = binary_limit(total, rows * n, share);
}

// common: sum(g sign) / n of each row.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    common_of_filters(const T* __restrict__ grad, const T* __restrict__ w, int64_t rows, BinaryShape shape, const float* __restrict__ mean,
                      float* common) {
  const int64_t n = shape.elements();
  for_items(rows, [&](int64_t row, bool there) {
    const float sum = sixteenth_sums(n, [&](int64_t i) {
      const float g = to_float_device(grad[row * n + i]);
      return to_float_device(w[row * n + i]) - mean[row * shape.taps + i % shape.taps] < 0.f ? 0.f - g : g;
    });
    if (there && threadIdx.x % ChannelTraits::lanes == 0) common[row] = sum / float(n);
  });
}

// average: [rows, taps], of dL/dv over the channels.
template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    average_of_taps(const T* __restrict__ grad, const T* __restrict__ w, int64_t rows, BinaryShape shape, const float* __restrict__ mean,
                    const float* __restrict__ scale, const float* limit, const float* __restrict__ common, float* average) {
  for_items(rows * shape.taps, [&](int64_t item, bool there) {
    const int64_t row = item / shape.taps, first = row * shape.elements() + item % shape.taps;
    const float sum = sixteenth_sums(shape.centred ? shape.channels : 0, [&](int64_t i) {
      const int64_t place = first + i * shape.taps;
      return binary_slope(to_float_device(grad[place]), to_float_device(w[place]) - mean[item], scale[row], common[row], *limit);
    });
    if (there && threadIdx.x % ChannelTraits::lanes == 0) average[item] = sum / float(shape.channels);
  });
}

template <typename T>
__global__ void __launch_bounds__(ChannelTraits::threads)
    binary_gradients(const T* __restrict__ grad, const T* __restrict__ w, int64_t rows, BinaryShape shape, const float* __restrict__ mean,
                     const float* __restrict__ scale, const float* limit, const float* __restrict__ common,
                     const float* __restrict__ average, float factor, T* out) {
  const int64_t n = shape.elements(), step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * n; i += step) {
    const int64_t row = i / n, item = row * shape.taps + i % n % shape.taps;
    const float own = binary_slope(to_float_device(grad[i]), to_float_device(w[i]) - mean[item], scale[row], common[row], *limit);
    out[i] = round_nearest((own - average[item]) * factor, T{});
  }
}

struct BinaryGrids {
  dim3 rows, taps, elements;
};

template <typename Launcher>
BinaryGrids binary_grids(const Launcher& launch, int64_t rows, BinaryShape shape) {
  const auto blocks = [&](int64_t items, int64_t per_block) {
    return dim3(unsigned(grid_size(launch.processors(), ChannelTraits::blocks, items, per_block)));
  };
  return {blocks(rows, ChannelTraits::channels), blocks(rows * shape.taps, ChannelTraits::channels),
          blocks(rows * shape.elements(), ChannelTraits::threads)};
}

// limit: holds the share, or with `relative` gets what it comes to. scale: [rows]; mean: [rows, taps].
template <typename T, typename Launcher>
void launch_binary(const T* w, int64_t rows, BinaryShape shape, double share, bool relative, T* y, float* scale, float* mean, float* limit,
                   Launcher& launch) {
  const BinaryGrids grids = binary_grids(launch, rows, shape);
  launch(centre_filters<T>, grids.taps, ChannelTraits::threads, w, rows, shape, mean);
  const float* means = mean;
  const float* bound = limit;
  if (relative) {
    launch(scale_filters<T>, grids.rows, ChannelTraits::threads, w, rows, shape, means, bound, scale, static_cast<T*>(nullptr));
    launch(limit_of_layer, dim3(1), Warp::lanes, static_cast<const float*>(scale), rows, shape.elements(), share, limit);
  }
  launch(scale_filters<T>, grids.rows, ChannelTraits::threads, w, rows, shape, means, bound, scale, y);
}

template <typename T, typename Launcher>
void launch_binary_backward(const T* grad, const T* w, int64_t rows, BinaryShape shape, const float* scale, const float* mean,
                            const float* limit, float factor, T* out, Launcher& launch) {
  const BinaryGrids grids = binary_grids(launch, rows, shape);
  float *common = launch.template scratch<float>(rows), *average = launch.template scratch<float>(rows * shape.taps);
  launch(common_of_filters<T>, grids.rows, ChannelTraits::threads, grad, w, rows, shape, mean, common);
  launch(average_of_taps<T>, grids.taps, ChannelTraits::threads, grad, w, rows, shape, mean, scale, limit,
         static_cast<const float*>(common), average);
  launch(binary_gradients<T>, grids.elements, ChannelTraits::threads, grad, w, rows, shape, mean, scale, limit,
         static_cast<const float*>(common), static_cast<const float*>(average), factor, out);
}

}  // namespace quantize::weight
