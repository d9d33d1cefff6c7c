// Codes of groups on the device, an element a thread.
#pragma once

#include "../core/grid.h"
#include "group_codes.h"

namespace quantize::packed {

struct GroupTraits {
  static constexpr int threads = 256, blocks = 8;  // blocks: of a multiprocessor
};

// offsets[group]: the bit of the stream, in units of group_size, where the group begins. out: [numel].
template <typename T>
__global__ void __launch_bounds__(GroupTraits::threads)
    unpack_groups(const uint8_t* __restrict__ codes, int64_t bytes, const uint8_t* __restrict__ group_bits,
                  const int64_t* __restrict__ offsets, int64_t group_size, int64_t numel, T* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += step) {
    const int64_t group = i / group_size;
    const int bits = bits_of_group(group_bits, group);
    out[i] = T(stream_code(codes, bytes, offsets[group] * group_size + (i - group * group_size) * bits, bits));
  }
}

// values, out: [numel]. scales: a row of two for every `span` of them.
template <typename T>
__global__ void __launch_bounds__(GroupTraits::threads)
    decode_groups(const T* __restrict__ values, const uint8_t* __restrict__ group_bits, const float* __restrict__ scales,
                  int64_t group_size, int64_t span, int64_t numel, float* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += step) {
    const GroupScale scale = group_scale(scales + i / span * 2, bits_of_group(group_bits, i / group_size));
    out[i] = group_value(scale, values[i]);
  }
}

}  // namespace quantize::packed
