// A call's groups as the device sees them: where a sample's codes start, how many bits they have.
#pragma once

#include "../core/divider.h"
#include "../core/warp.cuh"
#include "group_lanes.h"

namespace quantize::activation {

struct PackedGroups {
  int64_t samples, elements, group_size, groups;  // elements and groups: of one sample
  int64_t sample_bytes;                           // of codes, where all samples have `bits`
  int64_t capacity;                               // bytes of codes
  const uint8_t* sample_bits;                     // [samples]; null: all have `bits`
  const int64_t* offsets;  // [samples + 1], bytes: where each sample's codes start and the last one's end; null with sample_bits
  int bits;
  Seed seed;
};

// Bits are data on the device, so no error can name them here. A sample whose bits are no width or whose codes would not fit gets no
// codes, and ranges that decode to NaN.
struct SamplePlace {
  int bits;
  int64_t offset;  // bytes
  bool valid;
};

QUANTIZE_DEVICE bool is_width(int bits) { return bits == 1 || bits == 2 || bits == 4 || bits == 8; }

QUANTIZE_DEVICE SamplePlace sample_place(const PackedGroups& p, int64_t sample) {
  if (p.sample_bits == nullptr) return {p.bits, sample * p.sample_bytes, true};
  const int bits = p.sample_bits[sample];
  if (!is_width(bits)) return {1, 0, false};
  return {bits, p.offsets[sample], p.offsets[sample + 1] <= p.capacity};
}

// A StoredRange as one word: ranges are [groups] of these on the device.
QUANTIZE_DEVICE uint32_t pack_range(StoredRange range) { return uint32_t(range.second) << 16 | range.first; }
QUANTIZE_DEVICE StoredRange unpack_range(uint32_t word) { return {uint16_t(word), uint16_t(word >> 16)}; }

struct PlaceTraits {
  static constexpr int threads = 256;
};

// offsets: [samples + 1]. One block: there are few samples, and their sum must be known before anything is written.
[[maybe_unused]] static __global__ void __launch_bounds__(PlaceTraits::threads) sample_offsets(PackedGroups p, int64_t* offsets) {
  constexpr int warps = PlaceTraits::threads / Warp::lanes;
  __shared__ int64_t warp_sum[warps];
  const int lane = threadIdx.x % Warp::lanes, warp = threadIdx.x / Warp::lanes;
  int64_t carry = 0;
  for (int64_t first = 0; first < p.samples; first += PlaceTraits::threads) {
    const int64_t n = first + threadIdx.x;
    const int bits = n < p.samples ? p.sample_bits[n] : 0;
    const int64_t bytes = is_width(bits) ? sample_code_bytes(p.elements, p.group_size, bits) : 0;
    int64_t before = bytes;  // inclusive within the warp
    for (int distance = 1; distance < Warp::lanes; distance *= 2) {
      const int64_t other = __shfl_up_sync(Warp::all, before, distance);
      if (lane >= distance) before += other;
    }
    __syncthreads();  // the previous round has read warp_sum
    if (lane == Warp::lanes - 1) warp_sum[warp] = before;
    __syncthreads();
    for (int w = 0; w < warps; ++w) {
      if (w < warp) before += warp_sum[w];
    }
    if (n < p.samples) offsets[n] = carry + before - bytes;
    for (int w = 0; w < warps; ++w) carry += warp_sum[w];
  }
  if (threadIdx.x == 0) offsets[p.samples] = carry;
}

// A group as a kernel works on it.
template <typename T>
struct GroupPlace {
  T* x;  // [n] elements
  int64_t n;
  int64_t codes;    // bytes from the start of the call's codes
  uint32_t number;  // of the call's groups
};

template <typename T>
QUANTIZE_DEVICE GroupPlace<T> group_place(const PackedGroups& p, T* x, const SamplePlace& place, int64_t sample, int64_t group) {
  const int64_t first = group * p.group_size, rest = p.elements - first;
  return {x + sample * p.elements + first, rest < p.group_size ? rest : p.group_size,
          place.offset + group * code_bytes(p.group_size, place.bits), uint32_t(sample * p.groups + group)};
}

// Kernels for any alignment and size give a warp one piece of a group at a time.
struct PieceTraits {
  static constexpr int threads = 128, warps = threads / Warp::lanes;
  static constexpr int blocks = 8;           // of a multiprocessor, about
  static constexpr int64_t elements = 4096;  // whole units, so that pieces meet on whole bytes; also the longest group in one pass
  static_assert(elements % UnitTraits::elements == 0 && threads % Warp::lanes == 0);
};

// The elements from `begin` on of the groups from `first_group` on of every sample.
struct PieceRange {
  int64_t first_group, begin;
  int64_t pieces;  // of one group

  static PieceRange of(const PackedGroups& p, int64_t first_group, int64_t begin) {
    const int64_t rest = p.group_size - begin;
    return {first_group, begin, (rest + PieceTraits::elements - 1) / PieceTraits::elements};
  }
};

// body(sample, its place, group, first element, end of the elements) by each warp for each of its pieces.
template <typename F>
QUANTIZE_DEVICE void for_each_piece(const PackedGroups& p, const PieceRange& range, const F& body) {
  const int64_t per_sample = (p.groups - range.first_group) * range.pieces, items = p.samples * per_sample;
  int64_t item = int64_t(blockIdx.x) * PieceTraits::warps + threadIdx.x / Warp::lanes;
  for (; item < items; item += int64_t(gridDim.x) * PieceTraits::warps) {
    const int64_t sample = item / per_sample, rest = item - sample * per_sample;
    const int64_t group = range.first_group + rest / range.pieces;
    const int64_t n = group + 1 < p.groups ? p.group_size : p.elements - group * p.group_size;
    const int64_t begin = range.begin + rest % range.pieces * PieceTraits::elements;
    if (begin < n)
      body(sample, sample_place(p, sample), group, begin, begin + PieceTraits::elements < n ? begin + PieceTraits::elements : n);
  }
}

}  // namespace quantize::activation
