// The body of diffq_kernels.h, included by one file per ISA.
#pragma once

#include <algorithm>

#include "clipped_noise_run.h"
#include "diffq_kernels.h"
#include "noise_run.h"

namespace quantize::weight {
namespace {

struct BitsLanes {
  Lanes bits, slope;
};

// learned_bits for each lane.
QUANTIZE_INLINE BitsLanes bits_lanes(Lanes logit, BitsBounds bounds) {
  Lanes l;
  for (int i = 0; i < Lanes::parts; ++i) {
    const Lanes::Part x = logit.part[i], upper = x < 60.f ? x : Lanes::Part{} + 60.f;
    l.part[i] = upper > -60.f ? upper : Lanes::Part{} - 60.f;
  }
  const Lanes sigmoid = Lanes(1.f) / (Lanes(1.f) + exp2_near(l * -1.44269504f));
  return {Lanes(bounds.low) + sigmoid * bounds.span, (sigmoid * (Lanes(1.f) - sigmoid)) * bounds.span};
}

QUANTIZE_INLINE Lanes rounded_lanes(Lanes bits, BitsBounds bounds) { return lower(higher(to_whole(bits), bounds.least), bounds.greatest); }

constexpr int abreast = 4;  // a chain of two exponentials and two divisions is long: several at a time

// use(i, b, levels, inverse) for groups [first, first + count), sixteen from the i-th on: their bits, 2^b, 1 / (2^b - 1). Up to `abreast`
// times as many lanes are touched, so that arrays need room for them.
template <typename Use>
QUANTIZE_INLINE void each_scale(const DiffQTensor& t, int64_t first, int64_t count, const Use& use) {
  const auto several = [&](int64_t i, const auto& load) __attribute__((always_inline)) {
    BitsLanes b[abreast];
    for (int j = 0; j < abreast; ++j) b[j] = bits_lanes(load(i + j * lanes), t.bounds);
    for (int j = 0; j < abreast; ++j) {
      const Lanes levels = exp2_near(b[j].bits);
      use(i + j * lanes, b[j], levels, Lanes(1.f) / (levels - 1.f));
    }
  };
  const float* logits = t.logits + first;
  int64_t i = 0;
  for (; i + abreast * lanes <= count; i += abreast * lanes) several(i, [&](int64_t k) { return load_lanes(logits + k); });
  if (i < count) several(i, [&](int64_t k) { return load_part(logits + k, std::max<int64_t>(count - k, 0)); });
}

// inverse[i] = 1 / (2^b - 1) of groups [first, first + count); the bits of all but the first `skip`, 0 or 1, are added to `sums`.
QUANTIZE_INLINE void noise_scales(const DiffQTensor& t, int64_t first, int64_t count, int64_t skip, float* inverse, DiffQBits& sums) {
  Lanes learned = 0.f, rounded = 0.f;
  each_scale(
      t, first, count, [&](int64_t i, const BitsLanes& b, Lanes, Lanes own) __attribute__((always_inline)) {
        store_lanes(own, inverse + i);
        Lanes bits = b.bits, whole = rounded_lanes(bits, t.bounds);
        if (i + lanes > count) bits = first_lanes(bits, count - i), whole = first_lanes(whole, count - i);
        if (i < skip) bits.part[0][0] = whole.part[0][0] = 0.f;
        learned += bits, rounded += whole;
      });
  sums.learned += sum_of(learned), sums.rounded += sum_of(rounded);
}

// 2^b - 1 with whole b.
QUANTIZE_INLINE void grid_steps(const DiffQTensor& t, int64_t first, int64_t count, float* steps) {
  for (int64_t i = 0; i < count; i += lanes)
    store_lanes(exp2_near(rounded_lanes(bits_lanes(load_part(t.logits + first + i, count - i), t.bounds).bits, t.bounds)) - 1.f, steps + i);
}

template <int size>
QUANTIZE_INLINE void repeat_each(const float* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < size; ++j) out[i * size + j] = values[i];
}

// out[i] = values of element begin + i's unit; values[0] is the first unit's. Room for a unit of 16 more.
QUANTIZE_INLINE void spread(const float* values, int64_t begin, int64_t end, int64_t size, float* out) {
  if (begin % size == 0 && (size == 4 || size == 8 || size == 16)) {
    const int64_t count = (end - begin + size - 1) / size;
    return size == 4   ? repeat_each<4>(values, count, out)
           : size == 8 ? repeat_each<8>(values, count, out)
                       : repeat_each<16>(values, count, out);
  }
  const int64_t first = begin / size;
  for_units(begin, end, size, [&](int64_t unit, int64_t from, int64_t to) { std::fill(out + from, out + to, values[unit - first]); });
}

// The ranges (part 1) or lower ends (part 0) of elements [begin, end).
QUANTIZE_INLINE void spread_ranges(const DiffQTensor& t, int part, int64_t begin, int64_t end, float* out) {
  for_units(begin, end, t.span, [&](int64_t row, int64_t from, int64_t to) { std::fill(out + from, out + to, t.ranges[2 * row + part]); });
}

constexpr int room = piece + 64;  // of a piece's elements, with what whole lanes and segments touch beyond

// Whether any lane is: a bit each.
QUANTIZE_INLINE uint32_t equal_lanes(Lanes v, float value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v.part[0], _mm512_set1_ps(value), _CMP_EQ_OQ);
#elif defined(__AVX2__)
  const __m256 all = _mm256_set1_ps(value);
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v.part[0], all, _CMP_EQ_OQ))) |
         unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v.part[1], all, _CMP_EQ_OQ))) << 8;
#else
  uint32_t bits = 0;
  for (int l = 0; l < lanes; ++l) bits |= uint32_t(v.part[l / Lanes::width][l % Lanes::width] == value) << l;
  return bits;
#endif
}

// The first of n elements, from i on, that is `value`; the last if none is.
template <typename T>
int32_t find_first(const T* w, int64_t n, int64_t i, float value) {
  for (; i + lanes <= n; i += lanes)
    if (const uint32_t found = equal_lanes(load_lanes(w + i), value)) return int32_t(i) + __builtin_ctz(found);
  while (i + 1 < n && !(to_float(w[i]) == value)) ++i;
  return int32_t(i);
}

template <typename T>
DiffQExtent find_extent(const void* source, int64_t n) {
  const T* w = static_cast<const T*>(source);
  constexpr int64_t part = 64 * lanes, chains = 2;  // side by side: one waits for itself
  float low = to_float(w[0]), high = low, poison = 0.f;
  int64_t low_part = 0, high_part = 0;  // where the lowest was met first
  for (int64_t first = 0; first < n; first += part) {
    const int64_t stop = std::min(first + part, n);
    float own_low = to_float(w[first]), own_high = own_low;
    int64_t i = first;
    if (i + lanes <= stop) {
      Lanes lows[chains], highs[chains], poisons[chains];
      for (int c = 0; c < chains; ++c) lows[c] = highs[c] = load_lanes(w + i), poisons[c] = lows[c] * 0.f;
      const auto join = [&](int c, Lanes v) __attribute__((always_inline)) {
        lows[c] = lower(lows[c], v), highs[c] = higher(highs[c], v), poisons[c] += v * 0.f;
      };
      for (i += lanes; i + chains * lanes <= stop; i += chains * lanes)
        for (int c = 0; c < chains; ++c) join(c, load_lanes(w + i + c * lanes));
      if (i + lanes <= stop) join(0, load_lanes(w + i)), i += lanes;
      own_low = reduce_lanes(lower(lows[0], lows[1]), [](auto a, auto b) { return b < a ? b : a; });
      own_high = reduce_lanes(higher(highs[0], highs[1]), [](auto a, auto b) { return b > a ? b : a; });
      poison += sum_of(poisons[0] + poisons[1]);
    }
    for (; i < stop; ++i) {
      const float v = to_float(w[i]);
      own_low = v < own_low ? v : own_low, own_high = v > own_high ? v : own_high, poison += v * 0.f;
    }
    if (own_low < low) low = own_low, low_part = first;
    if (own_high > high) high = own_high, high_part = first;
  }
  if (poison != 0.f) return {poison, poison, 0, 0};  // NaN
  return {low, high - low, find_first(w, n, low_part, low), find_first(w, n, high_part, high)};
}

template <typename T>
DiffQBits add_noise(const DiffQTensor& t, const void* source, int64_t begin, int64_t end, void* target) {
  const T* w = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  DiffQBits sums;
  alignas(64) float noise[block + lanes], scale[room], range[room], inverse[room];
  const int64_t ahead = end - begin;
  const bool past_caches = t.past_caches && reinterpret_cast<uintptr_t>(y) % 64 == 0;  // a block begins at a multiple of its bytes
  for (int64_t next; begin < end; begin = next) {
    next = std::min(end, begin / piece * piece + piece);
    const int64_t first = begin / t.group_size, n = next - begin;
    const int64_t groups = (next - 1) / t.group_size - first + 1;
    noise_scales(t, first, groups, first * t.group_size < begin, inverse, sums);  // a group counts where it begins
    const bool in_rows = t.span % t.group_size == 0;                              // groups lie within rows: a factor each
    if (in_rows)
      for_units(first, first + groups, t.span / t.group_size, [&](int64_t row, int64_t from, int64_t to) {
        for (int64_t g = from; g < to; ++g) inverse[g] = t.ranges[2 * row + 1] * inverse[g];
      });
    spread(inverse, begin, next, t.group_size, scale);
    if (!in_rows) {
      spread_ranges(t, 1, begin, next, range);
      for (int64_t i = 0; i < n; i += lanes) store_lanes(load_lanes(range + i) * load_lanes(scale + i), scale + i);
    }
    for (int64_t from = begin / block * block; from < next; from += block) {
      // What is read from memory is the next stretch: it comes while this one's noise is made.
      for (int64_t i = 0; i < block; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(w + from + i + ahead, 0, 2);
      if (from >= begin && from + block <= next && !t.quantiles) {
        const auto value = [&](int i, Lanes v) __attribute__((always_inline)) {
          return load_lanes(w + from + i) + v * load_lanes(scale + (from - begin) + i);
        };
        if constexpr (T::scalar == Scalar::f32)
          if (past_caches) {
            each_noise<true>(
                t.seed, t.stream, nullptr,
                from / block, [&](int i, Lanes v) __attribute__((always_inline)) { stream_lanes(value(i, v), y + from + i); });
            continue;
          }
        each_noise<true>(
            t.seed, t.stream, nullptr,
            from / block, [&](int i, Lanes v) __attribute__((always_inline)) { store_lanes(value(i, v), y + from + i); });
        continue;
      }
      draw_noise(t.seed, t.stream, t.quantiles, from / block, noise);
      const int64_t stop = std::min(from + block, next);
      for (int64_t i = std::max(from, begin); i < stop; i += lanes)
        store_part(load_part(w + i, stop - i) + load_lanes(noise + (i - from)) * load_lanes(scale + (i - begin)), y + i, stop - i);
    }
  }
  if (past_caches) end_streams();
  return sums;
}

template <typename T>
void round_to_grid(const DiffQTensor& t, const void* source, int64_t begin, int64_t end, void* target) {
  const T* w = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  alignas(64) float steps[room], low[room], range[room], own[room];
  for (int64_t next; begin < end; begin = next) {
    next = std::min(end, begin + piece);
    const int64_t first = begin / t.group_size, n = next - begin;
    grid_steps(t, first, (next - 1) / t.group_size - first + 1, own);
    spread(own, begin, next, t.group_size, steps);
    spread_ranges(t, 0, begin, next, low), spread_ranges(t, 1, begin, next, range);
    for (int64_t i = 0; i < n; i += lanes) {
      const Lanes most = load_lanes(steps + i), base = load_lanes(low + i), step = load_lanes(range + i) / most;
      Lanes ratio = (load_part(w + begin + i, n - i) - base) / step;
      for (int p = 0; p < Lanes::parts; ++p) ratio.part[p] = step.part[p] > 0.f ? ratio.part[p] : Lanes::Part{};
      store_part(base + lower(higher(to_whole(ratio), 0.f), most) * step, y + begin + i, n - i);
    }
  }
}

// The sum of n floats: lane by lane, then over the lanes.
QUANTIZE_INLINE float sum_segment(const float* p, int64_t n) {
  Lanes sum = 0.f;
  for (int64_t i = 0; i < n; i += lanes) sum += load_part(p + i, n - i);
  return sum_of(sum);
}

// sum_segment of each `size` floats (4, 8, 16), four at a time and without adding the zeros; sums has room for three more.
template <int size>
QUANTIZE_INLINE void sum_segments(const float* p, int64_t count, float* sums) {
  using Quarter = float __attribute__((vector_size(16)));
  using Places = int32_t __attribute__((vector_size(16)));
  const auto quarter = [&](int64_t segment, int i) {
    Quarter q;
    std::memcpy(&q, p + segment * size + 4 * i, sizeof q);
    return q;
  };
  for (int64_t i = 0; i < count; i += 4) {
    Quarter own[4];
    for (int j = 0; j < 4; ++j) {
      if constexpr (size == 4) own[j] = quarter(i + j, 0);
      if constexpr (size == 8) own[j] = quarter(i + j, 0) + quarter(i + j, 1);
      if constexpr (size == 16) own[j] = (quarter(i + j, 0) + quarter(i + j, 2)) + (quarter(i + j, 1) + quarter(i + j, 3));
    }
    const Places low = {0, 1, 4, 5}, high = {2, 3, 6, 7}, even = {0, 2, 4, 6}, odd = {1, 3, 5, 7};
    const Quarter first = __builtin_shuffle(own[0], own[1], low) + __builtin_shuffle(own[0], own[1], high);
    const Quarter second = __builtin_shuffle(own[2], own[3], low) + __builtin_shuffle(own[2], own[3], high);
    const Quarter all = __builtin_shuffle(first, second, even) + __builtin_shuffle(first, second, odd);
    std::memcpy(sums + i, &all, sizeof all);
  }
}

// Where the sum of a unit of `size` elements goes: see DiffQSums.
struct Place {
  int64_t begin, end, n;

  float& operator()(int64_t unit, int64_t size, float* whole, float* cut) const {
    if (unit * size < begin) return cut[0];
    return std::min((unit + 1) * size, n) > end ? cut[1] : whole[unit];
  }
};

// The sums of the groups of a piece, from products of its elements; room for 64 more behind them, and for three more sums.
QUANTIZE_INLINE void sum_groups(float* products, int64_t begin, int64_t end, int64_t size, float* sums) {
  if (size == 4 || size == 8 || size == 16) {  // none is cut; what the last one lacks are zeros
    std::fill(products + (end - begin), products + (end - begin) + 64, 0.f);
    const int64_t count = (end - begin + size - 1) / size;
    return size == 4   ? sum_segments<4>(products, count, sums)
           : size == 8 ? sum_segments<8>(products, count, sums)
                       : sum_segments<16>(products, count, sums);
  }
  for_units(begin, end, size,
            [&](int64_t group, int64_t from, int64_t to) { sums[group - begin / size] = sum_segment(products + from, to - from); });
}

template <typename T>
void backward_piece(const DiffQTensor& t, const void* source, int64_t index, DiffQSums sums) {
  const T* grad = static_cast<const T*>(source);
  alignas(64) float noise[piece + 2 * block], by_group[room], by_row[room], inverse[room], slope[room];
  constexpr int64_t ahead = 4 * piece;  // what is read from memory meanwhile
  const int64_t begin = index * piece, end = std::min(t.n, begin + piece), n = end - begin;
  const int64_t first = begin / t.group_size, groups = (end - 1) / t.group_size - first + 1;
  const Place place{begin, end, t.n};
  each_scale(
      t, first, groups, [&](int64_t i, const BitsLanes& b, Lanes levels, Lanes own) __attribute__((always_inline)) {
        store_lanes(own, inverse + i);
        store_lanes(levels * -0.69314718f * own * own * b.slope, slope + i);
      });
  for (int64_t from = 0; from < n; from += block) {  // noise becomes its products
    for (int64_t i = 0; i < block; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(grad + begin + from + i + ahead, 0, 2);
    const auto multiply = [&](int i, Lanes v) __attribute__((always_inline)) {
      store_lanes(load_lanes(grad + begin + from + i) * v, noise + from + i);
    };
    if (from + block <= n && !t.quantiles) {
      each_noise<true>(t.seed, t.stream, nullptr, (begin + from) / block, multiply);
      continue;
    }
    draw_noise(t.seed, t.stream, t.quantiles, (begin + from) / block, noise + from);
    for (int64_t i = from; i < std::min(n, from + block); i += lanes)
      store_lanes(load_part(grad + begin + i, n - i) * load_lanes(noise + i), noise + i);
  }
  if (t.span % t.group_size == 0) {  // groups lie within rows: a row's sum is of its groups' sums
    sum_groups(noise, begin, end, t.group_size, by_group);
    for (int64_t g = 0; g < groups; g += lanes) {
      store_lanes(load_lanes(by_group + g) * load_lanes(inverse + g), by_row + g);
      store_lanes(load_lanes(by_group + g) * load_lanes(slope + g), by_group + g);
    }
    for_units(first, first + groups, t.span / t.group_size, [&](int64_t row, int64_t from, int64_t to) {
      place(row, t.span, sums.ranges, sums.cut_rows) = sum_segment(by_row + from, to - from);
      const float range = t.ranges[2 * row + 1];
      for (int64_t g = from; g < to; ++g) by_group[g] *= range;
    });
  } else {
    spread(inverse, begin, end, t.group_size, by_row);
    spread_ranges(t, 1, begin, end, by_group);
    for (int64_t i = 0; i < n; i += lanes) {
      const Lanes product = load_lanes(noise + i);
      store_lanes(product * load_lanes(by_group + i), by_group + i);
      store_lanes(product * load_lanes(by_row + i), by_row + i);
    }
    for_units(begin, end, t.span, [&](int64_t row, int64_t from, int64_t to) {
      place(row, t.span, sums.ranges, sums.cut_rows) = sum_segment(by_row + from, to - from);
    });
    sum_groups(by_group, begin, end, t.group_size, inverse);
    for (int64_t g = 0; g < groups; g += lanes) store_lanes(load_lanes(inverse + g) * load_lanes(slope + g), by_group + g);
  }
  if (piece % t.group_size == 0)
    std::copy(by_group, by_group + groups, sums.logits + first);
  else
    for (int64_t g = 0; g < groups; ++g) place(first + g, t.group_size, sums.logits, sums.cut_groups) = by_group[g];
}

double find_bits(const float* logits, int64_t n, BitsBounds bounds, bool rounded, float* bits, float* slope, float factor) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += piece) {
    Lanes sum[abreast], found[abreast];
    for (Lanes& own : sum) own = 0.f;
    const int64_t end = std::min<int64_t>(n, begin + piece);
    // Chains side by side, as in noise_scales: nothing may come between them.
    const auto several = [&](int64_t i, const auto& load, const auto& store) __attribute__((always_inline)) {
      BitsLanes b[abreast];
      for (int j = 0; j < abreast; ++j) b[j] = bits_lanes(load(i + j * lanes), bounds);
      for (int j = 0; j < abreast; ++j) found[j] = rounded ? rounded_lanes(b[j].bits, bounds) : b[j].bits;
      for (int j = 0; bits && j < abreast; ++j) store(found[j], bits + i + j * lanes, i + j * lanes);
      for (int j = 0; slope && j < abreast; ++j) store(b[j].slope * factor, slope + i + j * lanes, i + j * lanes);
    };
    int64_t i = begin;
    for (; i + abreast * lanes <= end; i += abreast * lanes) {
      several(
          i, [&](int64_t at) { return load_lanes(logits + at); }, [](Lanes v, float* to, int64_t) { store_lanes(v, to); });
      for (int j = 0; j < abreast; ++j) sum[j] += found[j];
    }
    if (i < end) {
      const auto left = [&](int64_t at) { return std::max<int64_t>(end - at, 0); };
      several(
          i, [&](int64_t at) { return load_part(logits + at, left(at)); },
          [&](Lanes v, float* to, int64_t at) { store_part(v, reinterpret_cast<F32*>(to), left(at)); });
      for (int j = 0; j < abreast; ++j) sum[j] += first_lanes(found[j], left(i + j * lanes));
    }
    total += sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

template <typename T>
constexpr DiffQKernels diffq_of{find_extent<T>,     add_noise<T>,     round_to_grid<T>, backward_piece<T>,
                                clip_with_noise<T>, clip_backward<T>, find_bits};

}  // namespace
}  // namespace quantize::weight
