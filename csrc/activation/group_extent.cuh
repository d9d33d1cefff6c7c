// Minima and maxima of groups: of a bundle in registers, of a group by one warp, of long groups by many.
#pragma once

#include "group_encode.cuh"

namespace quantize::activation {

// The maximum negated, so that both are minima; NaN in both where the group holds a NaN.
struct alignas(8) MinPair {
  float min, negated_max;

  QUANTIZE_DEVICE static MinPair empty() { return {INFINITY, INFINITY}; }
  QUANTIZE_DEVICE void add(float x) { min = min_or_nan(min, x), negated_max = min_or_nan(negated_max, -x); }
  QUANTIZE_DEVICE void add(const MinPair& other) {
    min = min_or_nan(min, other.min), negated_max = min_or_nan(negated_max, other.negated_max);
  }
  QUANTIZE_DEVICE Extent extent() const {
    constexpr uint32_t exponent = 0x7f800000u;
    const bool finite = (float_bits(min) & exponent) != exponent && (float_bits(negated_max) & exponent) != exponent;
    return {min, -negated_max, finite};
  }
};

QUANTIZE_DEVICE MinPair warp_reduce(MinPair pair) {
  for (int mask = Warp::lanes / 2; mask > 0; mask /= 2)
    pair.add({__shfl_xor_sync(Warp::all, pair.min, mask), __shfl_xor_sync(Warp::all, pair.negated_max, mask)});
  return pair;
}

// Eight values a lane, reduced over the warp, in nine shuffles instead of forty: each step halves the values that a lane looks after.
// Lane l is left with value l / 4.
template <typename Value, typename Min>
QUANTIZE_DEVICE Value reduce_eight(Value (&values)[8], int lane, const Min& least) {
  static_for<3>([&]<int s>() {
    constexpr int mask = 16 >> s, count = 4 >> s;
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Value keep = upper ? values[i + count] : values[i], send = upper ? values[i] : values[i + count];
      values[i] = least(keep, __shfl_xor_sync(Warp::all, send, mask));
    }
  });
  const Value pairs = least(values[0], __shfl_xor_sync(Warp::all, values[0], 2));
  return least(pairs, __shfl_xor_sync(Warp::all, pairs, 1));
}

// The unit of a bundle whose range a lane works out.
template <typename T>
QUANTIZE_DEVICE int lane_unit(int lane) {
  return lane / (Warp::lanes / Lanes<VectorTraits<T>::elements>::units);
}

// The extent of the group that lane_unit(lane) belongs to. units_per_group: a power of two that divides the bundle's units.
template <typename T>
QUANTIZE_DEVICE Extent bundle_extent(const uint4 (&vectors)[8], int units_per_group, int lane) {
  using L = Lanes<VectorTraits<T>::elements>;
  constexpr int unit_lanes = Warp::lanes / L::units;
  if constexpr (T::scalar == Scalar::f32) {
    float values[8];  // minimum and negated maximum of each unit
#pragma unroll
    for (int unit = 0; unit < L::units; ++unit) {
      float min = vector_element<T>(vectors[2 * unit], 0), negated_max = -min;
#pragma unroll
      for (int i = 1; i < 8; ++i) {
        const float x = vector_element<T>(vectors[2 * unit + i / 4], i % 4);
        min = min_or_nan(min, x), negated_max = min_or_nan(negated_max, -x);
      }
      values[2 * unit] = min, values[2 * unit + 1] = negated_max;
    }
    const auto least = [](float a, float b) { return min_or_nan(a, b); };
    float own = reduce_eight(values, lane, least);
    for (int units = 1; units < units_per_group; units *= 2) own = least(own, __shfl_xor_sync(Warp::all, own, units * unit_lanes));
    const float other = __shfl_xor_sync(Warp::all, own, 4);
    return (lane & 4 ? MinPair{other, own} : MinPair{own, other}).extent();
  } else {
    const auto least = [](uint32_t a, uint32_t b) { return packed_min_or_nan<T>(a, b); };
    const auto greatest = [](uint32_t a, uint32_t b) { return packed_max_or_nan<T>(a, b); };
    uint32_t values[8];  // of each unit: minimum in the lower half, negated maximum in the upper
#pragma unroll
    for (int unit = 0; unit < L::units; ++unit) {
      const uint4& v = vectors[unit];
      const uint32_t min = least(least(v.x, v.y), least(v.z, v.w));
      const uint32_t negated_max = greatest(greatest(v.x, v.y), greatest(v.z, v.w)) ^ 0x80008000u;
      values[unit] = least(byte_permute(min, negated_max, 0x5410), byte_permute(min, negated_max, 0x7632));
    }
    uint32_t own = reduce_eight(values, lane, least);
    for (int units = 1; units < units_per_group; units *= 2) own = least(own, __shfl_xor_sync(Warp::all, own, units * unit_lanes));
    return MinPair{to_float_device(T{uint16_t(own)}), to_float_device(T{uint16_t(own >> 16)})}.extent();
  }
}

// body(value) for the elements [begin, end) of x, by the warp; in 16-byte loads where they are aligned.
template <typename T, typename F>
QUANTIZE_DEVICE void for_each_value(const T* x, int64_t begin, int64_t end, int lane, const F& body) {
  constexpr int V = VectorTraits<T>::elements;
  int64_t e = begin;
  if (reinterpret_cast<uintptr_t>(x + begin) % 16 == 0) {
#pragma unroll 2
    for (; e + Warp::lanes * V <= end; e += Warp::lanes * V) {
      const uint4 vector = *reinterpret_cast<const uint4*>(x + e + lane * V);
#pragma unroll
      for (int i = 0; i < V; ++i) body(vector_element<T>(vector, i));
    }
  }
  for (e += lane; e < end; e += Warp::lanes) body(to_float_device(x[e]));
}

template <typename T>
QUANTIZE_DEVICE MinPair warp_extent(const T* x, int64_t begin, int64_t end, int lane) {
  MinPair pair = MinPair::empty();
  for_each_value(x, begin, end, lane, [&](float value) { pair.add(value); });
  return warp_reduce(pair);
}

// Groups too long for one warp, first pass. pairs: [all groups, range.pieces].
template <typename T>
__global__ void __launch_bounds__(PieceTraits::threads)
    extent_pieces(PackedGroups p, PieceRange range, const T* __restrict__ x, MinPair* pairs) {
  const int lane = threadIdx.x % Warp::lanes;
  for_each_piece(p, range, [&](int64_t sample, const SamplePlace&, int64_t group, int64_t begin, int64_t end) {
    const MinPair pair = warp_extent(x + sample * p.elements + group * p.group_size, begin, end, lane);
    if (lane == 0) pairs[(sample * p.groups + group) * range.pieces + begin / PieceTraits::elements] = pair;
  });
}

// Groups too long for one warp, second pass: a block a group. pairs: [all groups, range.pieces]; each row's first becomes the group's.
[[maybe_unused]] static __global__ void __launch_bounds__(PieceTraits::threads)
    join_pieces(PackedGroups p, PieceRange range, MinPair* pairs) {
  __shared__ MinPair of_warp[PieceTraits::warps];
  for (int64_t number = blockIdx.x; number < p.samples * p.groups; number += gridDim.x) {
    const int64_t group = number % p.groups, n = group + 1 < p.groups ? p.group_size : p.elements - group * p.group_size;
    MinPair* row = pairs + number * range.pieces;
    MinPair pair = MinPair::empty();
    for (int64_t i = threadIdx.x; i * PieceTraits::elements < n; i += PieceTraits::threads) pair.add(row[i]);
    pair = warp_reduce(pair);
    __syncthreads();  // the previous group has read of_warp
    if (threadIdx.x % Warp::lanes == 0) of_warp[threadIdx.x / Warp::lanes] = pair;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int warp = 1; warp < PieceTraits::warps; ++warp) pair.add(of_warp[warp]);
    row[0] = pair;
  }
}

// The two passes.
template <typename T, typename Launcher>
MinPair* launch_extents(const PackedGroups& p, const PieceRange& all, dim3 piece_grid, dim3 group_grid, const T* x, Launcher& launch) {
  MinPair* pairs = launch.template scratch<MinPair>(p.samples * p.groups * all.pieces);
  launch(extent_pieces<T>, piece_grid, PieceTraits::threads, p, all, x, pairs);
  launch(join_pieces, group_grid, PieceTraits::threads, p, all, pairs);
  return pairs;
}

}  // namespace quantize::activation
