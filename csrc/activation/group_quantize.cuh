// Quantizing groups of any size at any alignment, byte by byte: what the register kernels leave.
#pragma once

#include "group_plan.cuh"

namespace quantize::activation {

// Whole groups of at most PieceTraits::elements, a warp each. x: [samples, elements]. codes: bytes. ranges: [all groups], pack_range.
template <typename T>
__global__ void __launch_bounds__(PieceTraits::threads)
    quantize_groups(PackedGroups p, PieceRange range, const T* __restrict__ x, uint8_t* codes, uint32_t* ranges) {
  const int lane = threadIdx.x % Warp::lanes;
  for_each_piece(p, range, [&](int64_t sample, const SamplePlace& place, int64_t group, int64_t, int64_t n) {
    const auto at = group_place(p, x, place, sample, group);
    Extent extent = warp_extent(at.x, 0, n, lane).extent();
    extent.finite = extent.finite && place.valid;
    const StoredRange stored = store_range<T>(extent, place.bits);
    if (lane == 0) ranges[at.number] = pack_range(stored);
    if (!place.valid) return;
    encode_bytes(at.x, n, at.number, load_range<T>(stored, place.bits), place.bits, p.seed, 0, code_bytes(n, place.bits), lane,
                 codes + at.codes);
  });
}

// pairs: [all groups, range.pieces], the first of each row the group's. ranges, plain: [all groups], pack_range and is_plain.
template <typename T>
__global__ void __launch_bounds__(PieceTraits::threads)
    range_of_groups(PackedGroups p, PieceRange range, const MinPair* pairs, uint32_t* ranges, uint8_t* plain) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t number = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; number < p.samples * p.groups; number += step) {
    const SamplePlace place = sample_place(p, number / p.groups);
    Extent extent = pairs[number * range.pieces].extent();
    extent.finite = extent.finite && place.valid;
    const StoredRange stored = store_range<T>(extent, place.bits);
    ranges[number] = pack_range(stored);
    plain[number] = is_plain(load_range<T>(stored, place.bits), extent.max, place.bits);
  }
}

// Pieces of groups whose ranges are known.
template <typename T>
__global__ void __launch_bounds__(PieceTraits::threads)
    encode_pieces(PackedGroups p, PieceRange range, const T* __restrict__ x, uint8_t* codes, const uint32_t* __restrict__ ranges) {
  const int lane = threadIdx.x % Warp::lanes;
  for_each_piece(p, range, [&](int64_t sample, const SamplePlace& place, int64_t group, int64_t begin, int64_t end) {
    if (!place.valid) return;
    const auto at = group_place(p, x, place, sample, group);
    encode_bytes(at.x, at.n, at.number, load_range<T>(unpack_range(ranges[at.number]), place.bits), place.bits, p.seed,
                 begin * place.bits / 8, code_bytes(end, place.bits), lane, codes + at.codes);
  });
}

// The whole op, three ways by group size:
//   256 .. 1024 elements (2048 of 16 bits), a power of two   one pass, values in registers (group_units.cuh);
//   others up to 4096                                        a warp a group, read twice, the second time from the L1 cache;
//   longer                                                   extents of pieces, ranges, then the codes: units from registers, the rest
//   here.
template <typename T, typename Launcher>
void launch_quantize(const GroupPlan& plan, const T* x, uint8_t* codes, uint32_t* ranges, Launcher& launch) {
  constexpr int bundle_units = Lanes<VectorTraits<T>::elements>::units;
  const PackedGroups& p = plan.groups;
  const int processors = launch.processors();
  const uint8_t* unknown = nullptr;
  if (p.group_size <= PieceTraits::elements) {
    const int64_t units_per_group = p.group_size / UnitTraits::elements;
    UnitRange whole = plan.units;  // of whole groups: the short one at a sample's end has a range of its own
    const bool registers = whole.units > 0 && p.group_size % UnitTraits::elements == 0 && bundle_units % units_per_group == 0;
    if (registers) {
      whole.units = uint32_t(plan.unit_groups.elements / p.group_size * units_per_group);
      launch(quantize_units<T>, plan.unit_grid(processors, whole, bundle_units), BundleTraits::threads, plan.unit_groups, whole, x, codes,
             ranges, unknown);
    }
    const PieceRange rest = PieceRange::of(p, registers ? p.elements / p.group_size : 0, 0);
    if (rest.first_group < p.groups)
      launch(quantize_groups<T>, plan.piece_grid(processors, rest), PieceTraits::threads, p, rest, x, codes, ranges);
    return;
  }
  const PieceRange all = PieceRange::of(p, 0, 0);
  const int64_t groups = p.samples * p.groups;
  const MinPair* pairs = launch_extents(p, all, plan.piece_grid(processors, all), plan.group_grid(processors, 1), x, launch);
  uint8_t* plain = launch.template scratch<uint8_t>(groups);
  launch(range_of_groups<T>, plan.group_grid(processors, PieceTraits::threads), PieceTraits::threads, p, all, pairs, ranges, plain);
  if (plan.units.units > 0)
    launch(quantize_units<T>, plan.unit_grid(processors, plan.units, bundle_units), BundleTraits::threads, plan.unit_groups, plan.units, x,
           codes, ranges, plain);
  if (plan.units.units == 0 || plan.has_rest()) {
    const PieceRange rest = plan.units.units > 0 ? plan.rest() : all;
    launch(encode_pieces<T>, plan.piece_grid(processors, rest), PieceTraits::threads, p, rest, x, codes, ranges);
  }
}

}  // namespace quantize::activation
