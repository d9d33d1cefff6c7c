// diffq on the device: all tensors of a call in a few launches. Sums are those of the CPU's pieces, by sixteen threads in its order.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/grid.h"
#include "../core/warp.cuh"
#include "diffq_kernels.h"

namespace quantize::weight {

struct DiffQDeviceTraits {
  static constexpr int threads = 128, team = 16, teams = threads / team;
  static constexpr int tensors = 20;    // of a launch, whose arguments have 4 KB
  static constexpr int part = 1 << 13;  // of a row of ranges: a warp's share
  static_assert(threads * DiffQTraits::slots == DiffQTraits::piece && Warp::lanes % team == 0);
};

// What a part of a row has: the first of its lowest and highest weights. poison: NaN if a weight is not finite, else 0.
struct DiffQRangePart {
  float low, high, poison;
  int32_t lowest, highest;
};

// A tensor of a launch; what a kernel does not need is null.
struct DiffQDeviceTensor {
  DiffQTensor t;
  const void* source;  // weights, or gradients
  void* target;
  int32_t* extremes;
  float *logits, *rows, *cut_groups, *cut_rows;  // as DiffQSums; cut: [pieces, 2]
  float *bits, *piece_bits;                      // [2], as DiffQBits; [pieces, 2]
  DiffQRangePart* parts;                         // [rows, parts_of_row]; null where that is 1
};

QUANTIZE_HOST_DEVICE int64_t parts_of_row(const DiffQTensor& t) {
  return ((t.span < t.n ? t.span : t.n) + DiffQDeviceTraits::part - 1) / DiffQDeviceTraits::part;
}

struct DiffQBatch {
  DiffQDeviceTensor tensor[DiffQDeviceTraits::tensors];
  int64_t first[DiffQDeviceTraits::tensors + 1];  // of the work items of each tensor
  int count;
};
static_assert(sizeof(DiffQBatch) <= 4000);

struct DiffQItem {
  const DiffQDeviceTensor& own;
  int64_t index;
};

// Whose work item `item` is, and which of its own.
QUANTIZE_DEVICE DiffQItem find_item(const DiffQBatch& batch, int64_t item) {
  int i = 0;
  while (i + 1 < batch.count && item >= batch.first[i + 1]) ++i;
  return {batch.tensor[i], item - batch.first[i]};
}

// Which group or row: of less than 2^31 elements, and much faster than in 64 bits.
QUANTIZE_DEVICE uint32_t unit_of(int64_t i, int64_t size) { return uint32_t(i) / uint32_t(size); }

// body(place, noise) for this thread's sixteen elements of the piece that its block works on.
template <typename Body>
QUANTIZE_DEVICE void for_noise(const DiffQTensor& t, int64_t piece, const Body& body) {
  using Traits = DiffQTraits;
  const int64_t block = piece * (Traits::piece / Traits::block) + threadIdx.x / Traits::counters;
  const int counter = threadIdx.x % Traits::counters;
  if (block * Traits::block >= t.n) return;
  const Philox4 draw = philox4x32(uint32_t(block) * Traits::counters + counter, t.stream, t.seed);
  static_for<Traits::slots>([&]<int slot>() {
    const int64_t i = block * Traits::block + slot * Traits::counters + counter;
    const uint32_t own = draw.word[slot % 8 / 2], word = slot < 8 ? own : exchange_bytes(own);
    if (i < t.n) body(i, noise_of(slot % 2 ? word >> 16 : word & 0xffffu, t.quantiles));
  });
}

QUANTIZE_DEVICE float team_sum(float value) {
  for (int mask = DiffQDeviceTraits::team / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(Warp::all, value, mask);
  return value;
}

QUANTIZE_DEVICE void take_extremes(DiffQRangePart& own, const DiffQRangePart& other) {
  if (other.low < own.low || (other.low == own.low && other.lowest < own.lowest)) own.low = other.low, own.lowest = other.lowest;
  if (other.high > own.high || (other.high == own.high && other.highest < own.highest)) own.high = other.high, own.highest = other.highest;
  own.poison += other.poison;
}

QUANTIZE_DEVICE void share_extremes(DiffQRangePart& own) {
  for (int mask = Warp::lanes / 2; mask > 0; mask /= 2)
    take_extremes(own, {__shfl_xor_sync(Warp::all, own.low, mask), __shfl_xor_sync(Warp::all, own.high, mask),
                        __shfl_xor_sync(Warp::all, own.poison, mask), __shfl_xor_sync(Warp::all, own.lowest, mask),
                        __shfl_xor_sync(Warp::all, own.highest, mask)});
}

QUANTIZE_DEVICE void store_range(const DiffQDeviceTensor& own, int64_t row, const DiffQRangePart& found) {
  const bool sound = found.poison == 0.f;
  const int begin = int(row * own.t.span);
  own.t.ranges[2 * row] = sound ? found.low : found.poison, own.t.ranges[2 * row + 1] = sound ? found.high - found.low : found.poison;
  own.extremes[2 * row] = sound ? found.lowest : begin, own.extremes[2 * row + 1] = sound ? found.highest : begin;
}

// Work items: parts of rows of ranges, a warp each.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_ranges(DiffQBatch batch) {
  constexpr int warps = DiffQDeviceTraits::threads / Warp::lanes;
  const int lane = threadIdx.x % Warp::lanes;
  for (int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / Warp::lanes; item < batch.first[batch.count];
       item += int64_t(gridDim.x) * warps) {
    const DiffQItem work = find_item(batch, item);
    const DiffQTensor& t = work.own.t;
    const T* w = static_cast<const T*>(work.own.source);
    const int64_t parts = parts_of_row(t), row = work.index / parts, row_end = std::min((row + 1) * t.span, t.n);
    const int64_t begin = std::min(row * t.span + (work.index - row * parts) * DiffQDeviceTraits::part, row_end - 1);
    const int64_t end = std::min(begin + DiffQDeviceTraits::part, row_end);  // the last row may be short: parts of its last weight
    const float first = to_float_device(w[begin]);
    DiffQRangePart own{first, first, 0.f, int(begin), int(begin)};
    for (int64_t i = begin + lane; i < end; i += Warp::lanes) {
      const float v = to_float_device(w[i]);
      if (v < own.low) own.low = v, own.lowest = int(i);
      if (v > own.high) own.high = v, own.highest = int(i);
      own.poison += v * 0.f;
    }
    share_extremes(own);
    if (lane != 0) continue;
    if (parts == 1)
      store_range(work.own, row, own);
    else
      work.own.parts[work.index] = own;
  }
}

// Work items: rows of several parts, a warp each.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_join_ranges(DiffQBatch batch) {
  constexpr int warps = DiffQDeviceTraits::threads / Warp::lanes;
  const int lane = threadIdx.x % Warp::lanes;
  for (int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / Warp::lanes; item < batch.first[batch.count];
       item += int64_t(gridDim.x) * warps) {
    const DiffQItem work = find_item(batch, item);
    const int64_t parts = parts_of_row(work.own.t);
    const DiffQRangePart* all = work.own.parts + work.index * parts;
    DiffQRangePart own = all[0];
    own.poison = 0.f;
    for (int64_t i = lane; i < parts; i += Warp::lanes) take_extremes(own, all[i]);
    share_extremes(own);
    if (lane == 0) store_range(work.own, work.index, own);
  }
}

template <typename T>
QUANTIZE_DEVICE T warp_sum(T value) {
  for (int mask = Warp::lanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(Warp::all, value, mask);
  return value;
}

// Work items: pieces, a block each.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_add_noise(DiffQBatch batch) {
  constexpr int warps = DiffQDeviceTraits::threads / Warp::lanes;
  __shared__ float learned_sums[warps], rounded_sums[warps];
  for (int64_t item = blockIdx.x; item < batch.first[batch.count]; item += gridDim.x) {
    const DiffQItem work = find_item(batch, item);
    const DiffQTensor& t = work.own.t;
    const T* w = static_cast<const T*>(work.own.source);
    T* y = static_cast<T*>(work.own.target);
    float learned = 0.f, rounded = 0.f;
    for_noise(t, work.index, [&](int64_t i, float noise) {
      const LearnedBits bits = learned_bits(t.logits[unit_of(i, t.group_size)], t.bounds);
      learned += bits.bits, rounded += rounded_bits(bits.bits, t.bounds);
      y[i] = round_nearest(to_float_device(w[i]) + noise * (t.ranges[2 * unit_of(i, t.span) + 1] * noise_scale(bits).inverse), T{});
    });
    learned = warp_sum(learned), rounded = warp_sum(rounded);
    if (threadIdx.x % Warp::lanes == 0)
      learned_sums[threadIdx.x / Warp::lanes] = learned, rounded_sums[threadIdx.x / Warp::lanes] = rounded;
    __syncthreads();
    if (threadIdx.x < 2) {
      const float* sums = threadIdx.x == 0 ? learned_sums : rounded_sums;
      float sum = 0.f;
      for (int warp = 0; warp < warps; ++warp) sum += sums[warp];
      work.own.piece_bits[2 * work.index + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// Work items: tensors, a block each, whose first two warps work.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_join_bits(DiffQBatch batch) {
  const int which = threadIdx.x / Warp::lanes, lane = threadIdx.x % Warp::lanes;
  for (int64_t item = blockIdx.x; item < batch.first[batch.count] && which < 2; item += gridDim.x) {
    const DiffQDeviceTensor& own = find_item(batch, item).own;
    double sum = 0;
    for (int64_t p = lane; p * DiffQTraits::piece < own.t.n; p += Warp::lanes) sum += double(own.piece_bits[2 * p + which]);
    sum = warp_sum(sum);
    if (lane == 0) own.bits[which] = float(sum);
  }
}

// Work items: pieces, a block each.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_round_to_grid(DiffQBatch batch) {
  for (int64_t item = blockIdx.x; item < batch.first[batch.count]; item += gridDim.x) {
    const DiffQItem work = find_item(batch, item);
    const DiffQTensor& t = work.own.t;
    const T* w = static_cast<const T*>(work.own.source);
    T* y = static_cast<T*>(work.own.target);
    const int64_t begin = work.index * DiffQTraits::piece;
    for (int64_t i = begin + threadIdx.x; i < begin + DiffQTraits::piece && i < t.n; i += blockDim.x) {
      const float bits = rounded_bits(learned_bits(t.logits[unit_of(i, t.group_size)], t.bounds).bits, t.bounds);
      const float* range = t.ranges + 2 * unit_of(i, t.span);
      y[i] = round_nearest(on_grid(to_float_device(w[i]), range[0], range[1], exp2_near(bits) - 1.f), T{});
    }
  }
}

// Sums of the units of `size` elements within a piece, from `products` of its elements: write(unit, sum).
template <typename Write>
QUANTIZE_DEVICE void sum_units(const float* products, int64_t begin, int64_t end, int64_t size, const Write& write) {
  using Traits = DiffQDeviceTraits;
  const int lane = threadIdx.x % Traits::team;
  const int64_t first = begin / size, units = (end - 1) / size - first + 1, rounds = (units + Traits::teams - 1) / Traits::teams;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t unit = first + round * Traits::teams + threadIdx.x / Traits::team;
    int64_t from = unit * size, to = from + size;
    from = from > begin ? from : begin, to = to < end ? to : end;  // an empty stretch beyond the last unit: warps stay whole
    float sum = 0.f;
    for (int64_t i = from + lane; i < to; i += Traits::team) sum += products[i - begin];
    sum = team_sum(sum);
    if (lane == 0 && unit < first + units) write(unit, sum);
  }
}

// Work items: pieces, a block each.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_gradients(DiffQBatch batch) {
  __shared__ float by_group[DiffQTraits::piece], by_row[DiffQTraits::piece];
  for (int64_t item = blockIdx.x; item < batch.first[batch.count]; item += gridDim.x) {
    const DiffQItem work = find_item(batch, item);
    const DiffQTensor& t = work.own.t;
    const T* grad = static_cast<const T*>(work.own.source);
    const int64_t begin = work.index * DiffQTraits::piece, end = begin + DiffQTraits::piece < t.n ? begin + DiffQTraits::piece : t.n;
    const auto place = [&](int64_t unit, int64_t size, float* whole, float* cut) -> float& {
      if (unit * size < begin) return cut[2 * work.index];
      return (unit + 1) * size > end && end < t.n ? cut[2 * work.index + 1] : whole[unit];
    };
    const auto write_group = [&](int64_t group, float value) { place(group, t.group_size, work.own.logits, work.own.cut_groups) = value; };
    const auto write_row = [&](int64_t row, float sum) { place(row, t.span, work.own.rows, work.own.cut_rows) = sum; };
    const bool in_rows = t.span % t.group_size == 0;  // a row's sum is of its groups' sums
    for_noise(t, work.index, [&](int64_t i, float noise) {
      const float product = to_float_device(grad[i]) * noise;
      by_group[i - begin] = in_rows ? product : product * t.ranges[2 * unit_of(i, t.span) + 1];
      if (!in_rows) by_row[i - begin] = product * noise_scale(learned_bits(t.logits[unit_of(i, t.group_size)], t.bounds)).inverse;
    });
    __syncthreads();
    const int64_t first = begin / t.group_size, groups = (end - 1) / t.group_size - first + 1;
    sum_units(by_group, begin, end, t.group_size, [&](int64_t group, float sum) {
      const NoiseScale scale = noise_scale(learned_bits(t.logits[group], t.bounds));
      if (in_rows) by_row[group - first] = sum * scale.inverse;
      write_group(group, in_rows ? sum * scale.slope * t.ranges[2 * (group / (t.span / t.group_size)) + 1] : sum * scale.slope);
    });
    if (in_rows) __syncthreads();
    if (in_rows)
      sum_units(by_row, first, first + groups, t.span / t.group_size, write_row);
    else
      sum_units(by_row, begin, end, t.span, write_row);
    __syncthreads();
  }
}

// The sum of the unit that boundary `index` between two pieces cuts, if none before has cut it.
QUANTIZE_DEVICE void join_unit(int64_t n, int64_t size, int64_t index, const float* cut, float* sums) {
  constexpr int64_t piece = DiffQTraits::piece;
  const int64_t boundary = index * piece, unit = boundary / size, first = unit * size / piece;
  if (boundary % size == 0 || first + 1 != index) return;
  const int64_t end = (unit + 1) * size < n ? (unit + 1) * size : n;
  float sum = cut[2 * first + 1];
  for (int64_t p = index; p * piece < end; ++p) sum += cut[2 * p];
  sums[unit] = sum;
}

// Work items: pieces, a thread each.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_join(DiffQBatch batch) {
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < batch.first[batch.count];
       item += int64_t(gridDim.x) * blockDim.x) {
    const DiffQItem work = find_item(batch, item);
    if (work.index == 0) continue;
    join_unit(work.own.t.n, work.own.t.group_size, work.index, work.own.cut_groups, work.own.logits);
    join_unit(work.own.t.n, work.own.t.span, work.index, work.own.cut_rows, work.own.rows);
  }
}

// Work items: rows of ranges, a thread each. The range is highest - lowest.
template <typename T>
__global__ void __launch_bounds__(DiffQDeviceTraits::threads) diffq_range_gradients(DiffQBatch batch) {
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < batch.first[batch.count];
       item += int64_t(gridDim.x) * blockDim.x) {
    const DiffQItem work = find_item(batch, item);
    T* w = static_cast<T*>(work.own.target);
    const int32_t* place = work.own.extremes + 2 * work.index;
    const float sum = work.own.rows[work.index];
    w[place[0]] = round_nearest(to_float_device(w[place[0]]) - sum, T{});
    w[place[1]] = round_nearest(to_float_device(w[place[1]]) + sum, T{});
  }
}

inline int64_t pieces_of(const DiffQTensor& t) { return (t.n + DiffQTraits::piece - 1) / DiffQTraits::piece; }
inline int64_t rows_of(const DiffQTensor& t) { return (t.n + t.span - 1) / t.span; }

// The kernel over all tensors; `per_block` work items of items(tensor) at once.
template <typename Kernel, typename Items, typename Launcher>
void launch_diffq(Kernel kernel, const std::vector<DiffQDeviceTensor>& tensors, const Items& items, int per_block, Launcher& launch) {
  for (size_t begin = 0; begin < tensors.size(); begin += DiffQDeviceTraits::tensors) {
    DiffQBatch batch{};
    batch.count = int(std::min<size_t>(DiffQDeviceTraits::tensors, tensors.size() - begin));
    for (int i = 0; i < batch.count; ++i) {
      batch.tensor[i] = tensors[begin + i];
      batch.first[i + 1] = batch.first[i] + items(tensors[begin + i].t);
    }
    const int64_t grid = grid_size(launch.processors(), 8, batch.first[batch.count], per_block);
    launch(kernel, dim3(unsigned(grid)), DiffQDeviceTraits::threads, batch);
  }
}

template <typename T, typename Launcher>
void launch_diffq_ranges(const std::vector<DiffQDeviceTensor>& tensors, Launcher& launch) {
  constexpr int warps = DiffQDeviceTraits::threads / Warp::lanes;
  launch_diffq(
      diffq_ranges<T>, tensors, [](const DiffQTensor& t) { return rows_of(t) * parts_of_row(t); }, warps, launch);
  const auto joined = [](const DiffQTensor& t) { return parts_of_row(t) > 1 ? rows_of(t) : 0; };
  if (std::any_of(tensors.begin(), tensors.end(), [&](const DiffQDeviceTensor& own) { return joined(own.t) > 0; }))
    launch_diffq(diffq_join_ranges<T>, tensors, joined, warps, launch);
}

template <typename T, typename Launcher>
void launch_diffq_noise(const std::vector<DiffQDeviceTensor>& tensors, Launcher& launch) {
  launch_diffq_ranges<T>(tensors, launch);
  launch_diffq(diffq_add_noise<T>, tensors, pieces_of, 1, launch);
  launch_diffq(
      diffq_join_bits<T>, tensors, [](const DiffQTensor&) -> int64_t { return 1; }, 1, launch);
}

template <typename T, typename Launcher>
void launch_diffq_round(const std::vector<DiffQDeviceTensor>& tensors, Launcher& launch) {
  launch_diffq_ranges<T>(tensors, launch);
  launch_diffq(diffq_round_to_grid<T>, tensors, pieces_of, 1, launch);
}

template <typename T, typename Launcher>
void launch_diffq_backward(const std::vector<DiffQDeviceTensor>& tensors, Launcher& launch) {
  launch_diffq(diffq_gradients<T>, tensors, pieces_of, 1, launch);
  launch_diffq(diffq_join<T>, tensors, pieces_of, DiffQDeviceTraits::threads, launch);
  launch_diffq(diffq_range_gradients<T>, tensors, rows_of, DiffQDeviceTraits::threads, launch);
}

static __global__ void __launch_bounds__(DiffQDeviceTraits::threads)
    diffq_find_bits(const float* __restrict__ logits, int64_t n, BitsBounds bounds, bool rounded, float* bits) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float own = learned_bits(logits[i], bounds).bits;
    bits[i] = rounded ? rounded_bits(own, bounds) : own;
  }
}

// The gradient of a tensor's bits: groups of `size` weights, the last one of `last`. grad: one number on the device.
static __global__ void __launch_bounds__(DiffQDeviceTraits::threads)
    diffq_bits_gradients(const float* __restrict__ logits, int64_t n, BitsBounds bounds, const float* grad, float size, float last,
                         float* out) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    out[i] = learned_bits(logits[i], bounds).slope * (*grad * (i + 1 < n ? size : last));
}

}  // namespace quantize::weight
