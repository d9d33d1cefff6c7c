// The whole units of 256 elements that the register kernels work on, a bundle a warp.
#pragma once

#include "group_extent.cuh"

namespace quantize::activation {

struct BundleTraits {
  static constexpr int threads = 128, warps = threads / Warp::lanes;
  static constexpr int blocks = 6;  // of a multiprocessor: 24 warps with 4 KB each on their way hide the latency of HBM
  static_assert(threads % Warp::lanes == 0);
};

// The first `units` units of every sample, unit u of a sample in its group u / units_per_group. If they are all there is, samples == 1.
struct UnitRange {
  uint32_t units;  // below 2^30
  Divider units_per_group;
};

// Where a unit is: the number of its group in the sample, and its own number in the group.
struct alignas(8) UnitPlace {
  uint32_t group, index;
};

// What a warp keeps in shared memory.
template <typename T>
struct alignas(16) BundleScratch {
  using L = Lanes<VectorTraits<T>::elements>;
  uint32_t noise[L::chunks * NoiseLayout::stride];
  UnitLevel levels[L::units];
  UnitPlace places[L::units];
};

QUANTIZE_DEVICE UnitPlace unit_place(const UnitRange& range, uint32_t unit) {
  const uint32_t group = range.units_per_group.quotient(unit);
  return {group, unit - group * range.units_per_group.divisor};
}

// body(first unit, units of this bundle) by each warp for each of its bundles of a sample. Blocks: (bundles, samples).
template <int bundle_units, typename F>
QUANTIZE_DEVICE void for_each_bundle(const UnitRange& range, const F& body) {
  const uint32_t step = gridDim.x * BundleTraits::warps * bundle_units;
  uint32_t first = (blockIdx.x * BundleTraits::warps + threadIdx.x / Warp::lanes) * bundle_units;
  for (; first < range.units; first += step) {
    const uint32_t rest = range.units - first;
    body(first, int(rest < bundle_units ? rest : bundle_units));
  }
}

// One 16-byte vector a lane and row; zeros behind the end.
template <typename T>
QUANTIZE_DEVICE void load_bundle(const T* x, int units, int lane, uint4 (&vectors)[8]) {
  using L = Lanes<VectorTraits<T>::elements>;
  const uint4* source = reinterpret_cast<const uint4*>(x) + lane;
  if (units == L::units) {  // nearly always, and without eight predicates
#pragma unroll
    for (int row = 0; row < L::rows; ++row) vectors[row] = source[row * Warp::lanes];
  } else {
#pragma unroll
    for (int row = 0; row < L::rows; ++row) vectors[row] = L::unit(row) < units ? source[row * Warp::lanes] : uint4{0, 0, 0, 0};
  }
}

// Each lane draws for one residue of every fourth chunk.
template <typename T>
QUANTIZE_DEVICE void draw_noise(const UnitPlace* places, uint32_t first_group, Seed seed, int lane, uint32_t* noise) {
  using L = Lanes<VectorTraits<T>::elements>;
#pragma unroll
  for (int chunk = lane / 8; chunk < L::chunks; chunk += 4) {
    const UnitPlace unit = places[chunk / 2];
    const uint32_t counter = 8 * (2 * unit.index + chunk % 2) + lane % 8;
    const Philox4 draw = philox4x32(counter, first_group + unit.group, seed);
#pragma unroll
    for (int output = 0; output < 4; ++output) noise[NoiseLayout::word(chunk, output, lane % 8)] = draw.word[output];
  }
}

// x: [samples, elements], 16-byte aligned like every sample in it. codes: 4-byte aligned like every sample's in it. ranges: [all groups],
// pack_range. plain: null, and the ranges are found here (units_per_group a power of two that divides a bundle); or [all groups], is_plain
// of ranges that are there already.
template <typename T>
__global__ void __launch_bounds__(BundleTraits::threads, BundleTraits::blocks)
    quantize_units(PackedGroups p, UnitRange range, const T* __restrict__ x, uint8_t* __restrict__ codes, uint32_t* ranges,
                   const uint8_t* plain) {
  using L = Lanes<VectorTraits<T>::elements>;
  __shared__ BundleScratch<T> scratches[BundleTraits::warps];
  BundleScratch<T>& scratch = scratches[threadIdx.x / Warp::lanes];
  const int lane = threadIdx.x % Warp::lanes, unit = lane_unit<T>(lane);
  const bool leader = lane % (Warp::lanes / L::units) == 0;  // one lane a unit

  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const SamplePlace place = sample_place(p, sample);
    const T* source = x + sample * p.elements;
    uint8_t* target = codes + place.offset;
    const uint32_t first_group = uint32_t(sample * p.groups);
    bool all_plain = true;
    for_each_bundle<L::units>(range, [&](uint32_t first, int units) {
      uint4 vectors[8];
      load_bundle(source + int64_t(first) * UnitTraits::elements, units, lane, vectors);
      const UnitPlace own = unit_place(range, first + unit);
      __syncwarp();  // the previous bundle has read the scratch
      if (leader) scratch.places[unit] = own;
      __syncwarp();
      draw_noise<T>(scratch.places, first_group, p.seed, lane, scratch.noise);

      Range level{};
      bool is_fast = true;
      if (plain == nullptr) {
        Extent extent = bundle_extent<T>(vectors, int(range.units_per_group.divisor), lane);
        extent.finite = extent.finite && place.valid;
        const StoredRange stored = store_range<T>(extent, place.bits);
        level = load_range<T>(stored, place.bits);
        is_fast = unit >= units || is_plain(level, extent.max, place.bits);
        if (leader && unit < units && own.index == 0) ranges[first_group + own.group] = pack_range(stored);
      } else if (unit < units) {
        level = load_range<T>(unpack_range(ranges[first_group + own.group]), place.bits);
        is_fast = plain[first_group + own.group];
      }
      if (leader) scratch.levels[unit] = {level.min, level.fixed_point};
      __syncwarp();
      if (!__all_sync(Warp::all, is_fast)) {
        all_plain = false;
        return;
      }
      auto* words = reinterpret_cast<uint32_t*>(target + int64_t(first) * UnitTraits::code_bytes(place.bits));
      const int dwords = units * UnitTraits::code_bytes(place.bits) / 4;
      switch (place.bits) {
        case 1:
          return encode_bundle<T, 1>(vectors, scratch.levels, scratch.noise, lane, dwords, words);
        case 2:
          return encode_bundle<T, 2>(vectors, scratch.levels, scratch.noise, lane, dwords, words);
        case 4:
          return encode_bundle<T, 4>(vectors, scratch.levels, scratch.noise, lane, dwords, words);
        default:
          return encode_bundle<T, 8>(vectors, scratch.levels, scratch.noise, lane, dwords, words);
      }
    });
    // Rare, so all of this warp's bundles are made (again) by the specification's own arithmetic; beside the loop it costs it no register.
    if (all_plain || !place.valid) continue;
    __syncwarp();  // this warp's ranges and codes are written
    for_each_bundle<L::units>(range, [&](uint32_t first, int units) {
      for (int u = 0; u < units; ++u) {
        const UnitPlace at = unit_place(range, first + u);
        const uint32_t number = first_group + at.group;
        const int64_t before = at.index, bytes = UnitTraits::code_bytes(place.bits), group_unit = int64_t(first) + u - before;
        encode_bytes(source + group_unit * UnitTraits::elements, (before + 1) * UnitTraits::elements, number,
                     load_range<T>(unpack_range(ranges[number]), place.bits), place.bits, p.seed, before * bytes, (before + 1) * bytes,
                     lane, target + group_unit * bytes);
      }
    });
  }
}

}  // namespace quantize::activation
