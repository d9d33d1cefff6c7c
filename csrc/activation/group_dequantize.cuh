// Unpacking groups: whole units a bundle a warp, and the rest element by element.
#pragma once

#include "group_plan.cuh"

namespace quantize::activation {

// What decoding needs to know of a unit; the last two for the dither of 16-bit types. first: the unit's first element in its group.
struct alignas(16) UnitDecode {
  float min, scale;
  uint32_t key, first;
};

template <typename T>
struct alignas(16) DecodeScratch {
  using L = Lanes<VectorTraits<T>::elements>;
  uint32_t codes[L::elements / 4];  // at 8 bits
  UnitDecode units[L::units];
};

// Whether decode_word's arithmetic gives decode()'s value: 2^23 * scale must be a number.
QUANTIZE_DEVICE bool decodes_plainly(Range range) {
  return range.min == range.min && (range.scale == 0.f || (range.scale >= 0x1p-96f && range.scale <= 0x1p100f));
}

// min + code * scale, rounded twice as decode() does. 2^23 + code is a float by construction, and taking 2^23 * scale away in the same
// operation leaves the exact product to be rounded once.
QUANTIZE_DEVICE float decode_word(uint32_t code, float min, float scale) {
  return min + __fmaf_rn(bits_float(0x4b000000u | code), scale, -8388608.f * scale);
}

// Elements e and e + 1, neither NaN.
template <typename T>
QUANTIZE_DEVICE uint32_t round_pair(float low, float high, uint32_t key, uint32_t e) {
  const auto split = [](float x) { return T::scalar == Scalar::bf16 ? float_bits(x) : split_level<T>(x); };
  return byte_permute(split(low) + dither_bits(key, e), split(high) + dither_bits(key, e + 1), 0x7632);
}

// Writes the bundle's `units` units. codes: shared, as in memory. y: the bundle's first element, 16-byte aligned.
template <typename T, int bits>
QUANTIZE_DEVICE void decode_bundle(const uint32_t* codes, const UnitDecode* decode, int units, int lane, T* y) {
  constexpr int V = VectorTraits<T>::elements;
  using L = Lanes<V>;
  using C = CodeLayout<V, bits>;
  uint4* target = reinterpret_cast<uint4*>(y) + lane;
  codes += C::dword(lane, 0, 0);
  const int shift = C::shift(lane, 0);
  static_for<L::rows>([&]<int row>() {
    if (L::unit(row) >= units) return;
    const UnitDecode unit = decode[L::unit(row)];
    [[maybe_unused]] const uint32_t e = unit.first + row * L::row_elements % UnitTraits::elements + lane * V;
    float values[V];
#pragma unroll
    for (int quad = 0; quad < L::quads; ++quad) {
      const uint4 words = *reinterpret_cast<const uint4*>(codes + C::dword(0, row, 4 * quad));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = vector_word(words, i) >> (shift + C::shift(0, row)) & ((1u << bits) - 1);
        values[4 * quad + i] = decode_word(code, unit.min, unit.scale);
      }
    }
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (T::scalar == Scalar::f32)
        out[i] = float_bits(values[i]);
      else
        out[i] = round_pair<T>(values[2 * i], values[2 * i + 1], unit.key, e + 2 * i);
    }
    target[row * Warp::lanes] = {out[0], out[1], out[2], out[3]};
  });
}

template <typename T, int bits>
QUANTIZE_DEVICE void load_codes(const uint32_t* __restrict__ source, int units, int lane, uint32_t* codes) {
  constexpr int words = Lanes<VectorTraits<T>::elements>::elements / 32 * bits, loads = words / Warp::lanes;
  static_assert(words % Warp::lanes == 0);
  const int valid = units * UnitTraits::code_bytes(bits) / 4;
  uint32_t word[loads];
#pragma unroll
  for (int i = 0; i < loads; ++i) word[i] = i * Warp::lanes + lane < valid ? source[i * Warp::lanes + lane] : 0;
#pragma unroll
  for (int i = 0; i < loads; ++i) codes[i * Warp::lanes + lane] = word[i];
}

// Element e of a group, whatever its size and alignment. A poisoned group's codes are not read.
template <typename T>
QUANTIZE_DEVICE T decode_element(const uint8_t* codes, int64_t e, int64_t n, Range range, int bits, uint32_t key) {
  uint32_t code = 0;
  if (!is_poisoned(range)) {
    const int64_t bit = code_bit(e, n, bits);
    code = codes[bit / 8] >> (bit % 8) & ((1u << bits) - 1);
  }
  return round_to<T>(decode(code, range), dither_bits(key, e));
}

template <typename T>
QUANTIZE_DEVICE Range place_range(const SamplePlace& place, uint32_t stored) {
  return place.valid ? load_range<T>(unpack_range(stored), place.bits) : Range{NAN, NAN, 0.f, true};
}

// codes: 4-byte aligned like every sample's in it. ranges: [all groups], pack_range. y: [samples, elements], 16-byte aligned like every
// sample in it.
template <typename T>
__global__ void __launch_bounds__(BundleTraits::threads, 8)
    dequantize_units(PackedGroups p, UnitRange range, const uint8_t* __restrict__ codes, const uint32_t* __restrict__ ranges, T* y) {
  using L = Lanes<VectorTraits<T>::elements>;
  __shared__ DecodeScratch<T> scratches[BundleTraits::warps];
  DecodeScratch<T>& scratch = scratches[threadIdx.x / Warp::lanes];
  const int lane = threadIdx.x % Warp::lanes, unit = lane_unit<T>(lane);

  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    const SamplePlace place = sample_place(p, sample);
    const uint8_t* source = codes + place.offset;
    T* target = y + sample * p.elements;
    const uint32_t first_group = uint32_t(sample * p.groups);
    const int64_t bytes = UnitTraits::code_bytes(place.bits);
    for_each_bundle<L::units>(range, [&](uint32_t first, int units) {
      const UnitPlace own = unit_place(range, first + unit);
      const Range level = place_range<T>(place, unit < units ? ranges[first_group + own.group] : 0);
      const uint32_t key = T::scalar == Scalar::f32 ? 0 : dither_key(first_group + own.group, p.seed);
      __syncwarp();  // the previous bundle has read the scratch
      if (lane % (Warp::lanes / L::units) == 0) scratch.units[unit] = {level.min, level.scale, key, own.index * UnitTraits::elements};
      if (__all_sync(Warp::all, unit >= units || decodes_plainly(level))) {
        const auto* words = reinterpret_cast<const uint32_t*>(source + first * bytes);
        T* bundle = target + int64_t(first) * UnitTraits::elements;
        const auto decode = [&]<int bits>() {
          load_codes<T, bits>(words, units, lane, scratch.codes);
          __syncwarp();
          decode_bundle<T, bits>(scratch.codes, scratch.units, units, lane, bundle);
        };
        switch (place.bits) {
          case 1:
            return decode.template operator()<1>();
          case 2:
            return decode.template operator()<2>();
          case 4:
            return decode.template operator()<4>();
          default:
            return decode.template operator()<8>();
        }
      }
      for (int u = 0; u < units; ++u) {
        const UnitPlace at = unit_place(range, first + u);
        const uint32_t number = first_group + at.group;
        const int64_t before = at.index, group_unit = int64_t(first) + u - before, begin = before * UnitTraits::elements;
        for (int64_t e = begin + lane; e < begin + UnitTraits::elements; e += Warp::lanes)
          target[group_unit * UnitTraits::elements + e] =
              decode_element<T>(source + group_unit * bytes, e, begin + UnitTraits::elements, place_range<T>(place, ranges[number]),
                                place.bits, dither_key(number, p.seed));
      }
    });
  }
}

// The elements of `range`, of any groups. codes: bytes. ranges: [all groups], pack_range. y: [samples, elements].
template <typename T>
__global__ void __launch_bounds__(PieceTraits::threads)
    dequantize_pieces(PackedGroups p, PieceRange range, const uint8_t* __restrict__ codes, const uint32_t* __restrict__ ranges, T* y) {
  const int lane = threadIdx.x % Warp::lanes;
  for_each_piece(p, range, [&](int64_t sample, const SamplePlace& place, int64_t group, int64_t begin, int64_t end) {
    const auto at = group_place(p, y, place, sample, group);
    const Range level = place_range<T>(place, ranges[at.number]);
    const uint32_t key = dither_key(at.number, p.seed);
    for (int64_t e = begin + lane; e < end; e += Warp::lanes)
      at.x[e] = decode_element<T>(codes + at.codes, e, at.n, level, place.bits, key);
  });
}

// The whole op.
template <typename T, typename Launcher>
void launch_dequantize(const GroupPlan& plan, const uint8_t* codes, const uint32_t* ranges, T* y, Launcher& launch) {
  const int processors = launch.processors();
  if (plan.units.units > 0)
    launch(dequantize_units<T>, plan.unit_grid(processors, plan.units, Lanes<VectorTraits<T>::elements>::units), BundleTraits::threads,
           plan.unit_groups, plan.units, codes, ranges, y);
  if (plan.units.units == 0 || plan.has_rest()) {
    const PieceRange rest = plan.units.units > 0 ? plan.rest() : PieceRange::of(plan.groups, 0, 0);
    launch(dequantize_pieces<T>, plan.piece_grid(processors, rest), PieceTraits::threads, plan.groups, rest, codes, ranges, y);
  }
}

}  // namespace quantize::activation
