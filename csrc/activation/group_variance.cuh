// The exact variance of packing each sample at 1, 2, 4 and 8 bits. Each term's distance is group_variance_run.h's; the order of summation
// is not the CPU's, nor are the quarters taken together, so the last bits may differ, but they are the same in every run.
#pragma once

#include "group_plan.cuh"

namespace quantize::activation {

struct VarianceTraits {
  static constexpr int widths = 4;    // 1, 2, 4, 8 bits
  static constexpr int slots = 1024;  // partial sums of a sample, at most
};

QUANTIZE_DEVICE double warp_sum(double value) {
  for (int mask = Warp::lanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(Warp::all, value, mask);
  return value;
}

// p(1 - p), p the fractional part of (x - min) / scale: 1/4 - (p - 1/2)^2, in which p - 1/2 is a level's distance less 1/2 from the
// nearest integer, below 2^22, so that adding 1.5 * 2^23 rounds to it.
QUANTIZE_DEVICE float spread_of(float distance, float inverse) {
  const float f = __fmaf_rn(distance, inverse, -0.5f), d = f - ((f + 12582912.f) - 12582912.f);
  return __fmaf_rn(-d, d, 0.25f);
}

// A warp sums up every slots-th piece of a sample. Blocks: (slots / warps, samples). x: [samples, elements]. pairs: null, and groups are
// single pieces whose extents are found here; or [all groups, range.pieces], the first of each row the group's. partial: [samples, slots,
// 4].
template <typename T>
__global__ void __launch_bounds__(PieceTraits::threads)
    variance_pieces(PackedGroups p, PieceRange range, const T* __restrict__ x, const MinPair* pairs, double* partial) {
  const int lane = threadIdx.x % Warp::lanes, width = 1 << lane % VarianceTraits::widths;
  const int64_t slot = int64_t(blockIdx.x) * PieceTraits::warps + threadIdx.x / Warp::lanes,
                slots = int64_t(gridDim.x) * PieceTraits::warps;
  for (int64_t sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
    double total[VarianceTraits::widths] = {};
    for (int64_t item = slot; item < p.groups * range.pieces; item += slots) {
      const int64_t group = item / range.pieces, begin = item % range.pieces * PieceTraits::elements;
      const int64_t n = group + 1 < p.groups ? p.group_size : p.elements - group * p.group_size;
      if (begin >= n) continue;
      const int64_t end = begin + PieceTraits::elements < n ? begin + PieceTraits::elements : n;
      const T* source = x + sample * p.elements + group * p.group_size;
      const MinPair pair = pairs ? pairs[(sample * p.groups + group) * range.pieces] : warp_extent(source, begin, end, lane);
      // Each lane works out one width.
      const Range own = load_range<T>(store_range<T>(pair.extent(), width), width);
      const bool counts = is_poisoned(own) || !(own.extreme || own.fixed_point == 0.f);
      const double weight = counts ? double(own.scale) * double(own.scale) : 0.;
      const float own_inverse = 1.f / own.scale, min = own.min;  // every width has the same minimum
      float inverse[VarianceTraits::widths], sum[VarianceTraits::widths] = {};
#pragma unroll
      for (int w = 0; w < VarianceTraits::widths; ++w) inverse[w] = __shfl_sync(Warp::all, own_inverse, w);
      for_each_value(source, begin, end, lane, [&](float value) {
        const float distance = value - min;
#pragma unroll
        for (int w = 0; w < VarianceTraits::widths; ++w) sum[w] += spread_of(distance, inverse[w]);
      });
#pragma unroll
      for (int w = 0; w < VarianceTraits::widths; ++w) {
        const double factor = __shfl_sync(Warp::all, weight, w);
        if (factor != 0.) total[w] += double(sum[w]) * factor;  // a sum that does not count may be anything
      }
    }
#pragma unroll
    for (int w = 0; w < VarianceTraits::widths; ++w) {
      const double all = warp_sum(total[w]);
      if (lane == 0) partial[(sample * slots + slot) * VarianceTraits::widths + w] = all;
    }
  }
}

// A warp a sample. partial: [samples, slots, 4]. variance: float32 [samples, 4].
[[maybe_unused]] static __global__ void __launch_bounds__(PieceTraits::threads)
    sum_variance(int64_t samples, int64_t slots, const double* __restrict__ partial, float* variance) {
  const int lane = threadIdx.x % Warp::lanes;
  int64_t sample = int64_t(blockIdx.x) * PieceTraits::warps + threadIdx.x / Warp::lanes;
  for (; sample < samples; sample += int64_t(gridDim.x) * PieceTraits::warps) {
    for (int w = 0; w < VarianceTraits::widths; ++w) {
      double total = 0;
      for (int64_t slot = lane; slot < slots; slot += Warp::lanes) total += partial[(sample * slots + slot) * VarianceTraits::widths + w];
      total = warp_sum(total);
      if (lane == 0) variance[sample * VarianceTraits::widths + w] = float(total);
    }
  }
}

// The whole op. p: without bits and codes. variance: float32 [samples, 4].
template <typename T, typename Launcher>
void launch_variance(const PackedGroups& p, const T* x, float* variance, Launcher& launch) {
  const GroupPlan plan(p, x, sizeof(T), nullptr);
  const int processors = launch.processors();
  const PieceRange all = PieceRange::of(p, 0, 0);
  const MinPair* pairs = nullptr;
  if (all.pieces > 1) pairs = launch_extents(p, all, plan.piece_grid(processors, all), plan.group_grid(processors, 1), x, launch);
  const int64_t rows = std::min<int64_t>(p.samples, 65535);
  const int64_t wanted = grid_size(processors, PieceTraits::blocks, rows * p.groups * all.pieces, PieceTraits::warps);
  const int64_t blocks = std::clamp<int64_t>(wanted / rows, 1, VarianceTraits::slots / PieceTraits::warps),
                slots = blocks * PieceTraits::warps;
  double* partial = launch.template scratch<double>(p.samples * slots * VarianceTraits::widths);
  launch(variance_pieces<T>, dim3(unsigned(blocks), unsigned(rows)), PieceTraits::threads, p, all, x, pairs, partial);
  launch(sum_variance, dim3(unsigned(grid_size(processors, PieceTraits::blocks, p.samples, PieceTraits::warps))), PieceTraits::threads,
         p.samples, slots, static_cast<const double*>(partial), variance);
}

}  // namespace quantize::activation
