// The body of max_pool_kernels.h, included by one file per ISA.
#pragma once

#include <limits>

#include "../core/lanes.h"
#include "max_pool_kernels.h"

namespace quantize::layers {
namespace {

// Sixteen maxima and their offsets.
struct Maxima {
  Lanes value;
  Lanes::Whole offset[Lanes::parts];
};

QUANTIZE_INLINE void store_offsets(const Maxima& m, uint8_t* p, int64_t count) {
  using Bytes = uint8_t __attribute__((vector_size(Lanes::width)));
  uint8_t bytes[lanes];
  for (int i = 0; i < Lanes::parts; ++i) {
    const Bytes own = __builtin_convertvector(m.offset[i], Bytes);
    std::memcpy(bytes + i * Lanes::width, &own, sizeof own);
  }
  if (count >= lanes)
    std::memcpy(p, bytes, lanes);
  else
    std::copy(bytes, bytes + count, p);
}

// One output after the other, as the definition reads.
template <typename T>
void pool_plane_row(const T* x, const PoolShape& s, int64_t place, T* y, uint8_t* offsets) {
  const int64_t top = s.start(0, place);
  for (int64_t o = 0; o < s.output[1]; ++o) {
    const int64_t left = s.start(1, o);
    T best{};
    int64_t found = -1;
    for (int64_t r = s.first_tap(0, top); r < s.end_tap(0, top); ++r)
      for (int64_t c = s.first_tap(1, left); c < s.end_tap(1, left); ++c) {
        const T own = x[(top + r * s.dilation[0]) * s.input[1] + left + c * s.dilation[1]];
        const float v = to_float(own);
        if (found < 0 || v > to_float(best) || v != v) best = own, found = r * s.kernel[1] + c;
      }
    y[o] = best;
    if (offsets) offsets[o] = uint8_t(found);
  }
}

// A row of the input's columns, padding included, from the first one that a window touches on: the maxima over a window's height. Columns
// are laid out stride by stride: those that are the same tap of neighbouring windows lie together.
struct Columns {
  static constexpr int32_t outside = 1 << 20;  // the offset in padding: behind all others of a window

  const PoolShape& s;
  int64_t count, each, size;  // columns; of them in one phase, with room for what vectors touch beyond; of all phases
  float *value, *phase_value;
  int32_t *offset, *phase_offset;

  Columns(const PoolShape& shape, void* scratch) : s(shape), count(shape.columns()), each(shape.phase()), size(each * s.stride[1]) {
    value = static_cast<float*>(scratch), phase_value = value + size;
    offset = reinterpret_cast<int32_t*>(phase_value + size), phase_offset = offset + size;
    std::fill_n(value, 2 * size, -std::numeric_limits<float>::infinity());
    std::fill_n(offset, 2 * size, outside);
  }

  // The maxima over the rows of the windows of output row `place`; false if there is a NaN.
  template <bool wanted, typename T>
  QUANTIZE_INLINE bool fill(const T* x, int64_t place) {
    const int64_t top = s.start(0, place), first = s.first_tap(0, top), end = s.end_tap(0, top), width = s.input[1];
    Lanes::Whole poison[Lanes::parts] = {};
    const auto reduce = [&](int64_t i, const auto& load) __attribute__((always_inline)) {
      const T* column = x + (top + first * s.dilation[0]) * width + i;
      Maxima m{load(column), {}};
      for (int p = 0; p < Lanes::parts; ++p) m.offset[p] += int32_t(first * s.kernel[1]), poison[p] |= m.value.part[p] != m.value.part[p];
      for (int64_t r = first + 1; r < end; ++r) {
        const Lanes own = load(column += s.dilation[0] * width);
        for (int p = 0; p < Lanes::parts; ++p) {
          const Lanes::Whole more = own.part[p] > m.value.part[p];
          poison[p] |= own.part[p] != own.part[p];
          m.value.part[p] = more ? own.part[p] : m.value.part[p];
          if constexpr (wanted) m.offset[p] = more ? int32_t(r * s.kernel[1]) - Lanes::Whole{} : m.offset[p];
        }
      }
      store_lanes(m.value, &value[s.padding[1] + i]);
      if constexpr (wanted) std::memcpy(&offset[s.padding[1] + i], m.offset, sizeof m.offset);
    };
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes)
      reduce(
          i, [](const T* p) __attribute__((always_inline)) { return load_lanes(p); });
    if (i < width)
      reduce(
          i, [&](const T* p) __attribute__((always_inline)) { return load_part(p, width - i); });
    // What the last vector left behind the row.
    std::fill_n(&value[s.padding[1] + width], lanes, -std::numeric_limits<float>::infinity());
    if constexpr (wanted) std::fill_n(&offset[s.padding[1] + width], lanes, outside);
    int32_t any = 0;
    for (const Lanes::Whole& own : poison)
      for (int l = 0; l < Lanes::width; ++l) any |= own[l];
    return !any;
  }

  // Strides of two are taken apart as they are read.
  template <typename V>
  QUANTIZE_INLINE void split(const V* from, V* to) const {
    for (int64_t phase = 0; phase < s.stride[1]; ++phase)
      for (int64_t i = 0, at = phase; at < count; ++i, at += s.stride[1]) to[phase * each + i] = from[at];
  }

  QUANTIZE_INLINE static Lanes every_second(const float* p) {
    Lanes own, between;
    split_pairs(load_lanes(p), load_lanes(p + lanes), own, between);
    return own;
  }

  // The maxima over the windows' widths, of the columns that fill() left.
  template <bool wanted, bool two, typename T>
  QUANTIZE_INLINE void reduce(T* y, uint8_t* offsets) {
    const bool split_up = !two && s.stride[1] > 1;
    if (split_up) {
      split(value, phase_value);
      if constexpr (wanted) split(offset, phase_offset);
    }
    const float* values = split_up ? phase_value : value;
    const int32_t* places = split_up ? phase_offset : offset;
    const auto load = [&](int64_t column, int64_t o, Lanes & value, Lanes::Whole * offset) __attribute__((always_inline)) {
      const int64_t at = two ? 2 * o + column : column % s.stride[1] * each + column / s.stride[1] + o;
      value = two ? every_second(values + at) : load_lanes(values + at);
      if constexpr (wanted) {
        const auto* p = reinterpret_cast<const float*>(places + at);
        const Lanes own = two ? every_second(p) : load_lanes(p);
        std::memcpy(offset, &own, sizeof own);
      }
    };
    for (int64_t o = 0; o < s.output[1]; o += lanes) {
      Maxima m{};
      load(0, o, m.value, m.offset);
      for (int64_t c = 1; c < s.kernel[1]; ++c) {
        Lanes own;
        Lanes::Whole own_offset[Lanes::parts];
        load(c * s.dilation[1], o, own, own_offset);
        for (int p = 0; p < Lanes::parts; ++p) {
          Lanes::Whole take = own.part[p] > m.value.part[p];
          if constexpr (wanted) {
            const Lanes::Whole place = own_offset[p] + int32_t(c);
            take |= (own.part[p] == m.value.part[p]) & (place < m.offset[p]);
            m.offset[p] = take ? place : m.offset[p];
          }
          m.value.part[p] = take ? own.part[p] : m.value.part[p];
        }
      }
      store_part(m.value, y + o, s.output[1] - o);
      if constexpr (wanted) store_offsets(m, offsets + o, s.output[1] - o);
    }
  }
};

template <typename T, bool wanted>
void pool_plane_rows(const T* x, const PoolShape& s, T* y, uint8_t* offsets, void* scratch) {
  Columns columns(s, scratch);
  for (int64_t place = 0; place < s.output[0]; ++place) {
    T* row = y + place * s.output[1];
    uint8_t* row_offsets = wanted ? offsets + place * s.output[1] : nullptr;
    if (columns.fill<wanted>(x, place))
      s.stride[1] == 2 ? columns.reduce<wanted, true>(row, row_offsets) : columns.reduce<wanted, false>(row, row_offsets);
    else
      pool_plane_row(x, s, place, row, row_offsets);
  }
}

template <typename T>
void pool_plane(const void* x, const PoolShape& s, void* y, uint8_t* offsets, void* scratch) {
  const T* source = static_cast<const T*>(x);
  T* target = static_cast<T*>(y);
  offsets ? pool_plane_rows<T, true>(source, s, target, offsets, scratch) : pool_plane_rows<T, false>(source, s, target, nullptr, scratch);
}

template <typename T, bool wanted>
void pool_pixels(const T* x, int64_t channels, const PoolShape& s, int64_t place, T* y, uint8_t* offsets) {
  const int64_t top = s.start(0, place);
  const T* taps[256];
  int32_t found[256];
  for (int64_t o = 0; o < s.output[1]; ++o, y += channels) {
    const int64_t left = s.start(1, o);
    int count = 0;
    for (int64_t r = s.first_tap(0, top); r < s.end_tap(0, top); ++r)
      for (int64_t c = s.first_tap(1, left); c < s.end_tap(1, left); ++c, ++count) {
        taps[count] = x + ((top + r * s.dilation[0]) * s.input[1] + left + c * s.dilation[1]) * channels;
        found[count] = int32_t(r * s.kernel[1] + c);
      }
    const auto reduce = [&](const auto& load) __attribute__((always_inline)) {
      Maxima m{load(taps[0]), {}};
      for (Lanes::Whole& own : m.offset) own += found[0];
      for (int t = 1; t < count; ++t) {
        const Lanes own = load(taps[t]);
        for (int p = 0; p < Lanes::parts; ++p) {
          const Lanes::Whole take = (own.part[p] > m.value.part[p]) | (own.part[p] != own.part[p]);
          m.value.part[p] = take ? own.part[p] : m.value.part[p];
          if constexpr (wanted) m.offset[p] = take ? found[t] - Lanes::Whole{} : m.offset[p];
        }
      }
      return m;
    };
    int64_t i = 0;
    for (; i + lanes <= channels; i += lanes) {
      const Maxima m = reduce([&](const T* tap) __attribute__((always_inline)) { return load_lanes(tap + i); });
      store_lanes(m.value, y + i);
      if constexpr (wanted) store_offsets(m, offsets + o * channels + i, lanes);
    }
    if (const int64_t rest = channels - i; rest > 0) {
      const Maxima m = reduce([&](const T* tap) __attribute__((always_inline)) { return load_part(tap + i, rest); });
      store_part(m.value, y + i, rest);
      if constexpr (wanted) store_offsets(m, offsets + o * channels + i, rest);
    }
  }
}

// The maxima over the windows' heights, of all columns, to `columns`; false if there is a NaN or an infinity.
template <typename T>
bool reduce_rows(const T* x, int64_t channels, const PoolShape& s, int64_t place, float* columns) {
  const int64_t top = s.start(0, place), first = s.first_tap(0, top), end = s.end_tap(0, top), row = s.input[1] * channels;
  const T* from = x + (top + first * s.dilation[0]) * row;
  Lanes poison(0.f);  // a NaN as soon as there is one
  const auto reduce = [&](int64_t i, const auto& load) __attribute__((always_inline)) {
    Lanes most = load(from + i);
    poison = exact_multiply_add(poison, most, Lanes(0.f));
    for (int64_t r = 1; r < end - first; ++r) {
      const Lanes own = load(from + r * s.dilation[0] * row + i);
      poison = exact_multiply_add(poison, own, Lanes(0.f));
      most = higher(own, most);
    }
    store_lanes(most, columns + i);
  };
  int64_t i = 0;
  for (; i + lanes <= row; i += lanes)
    reduce(
        i, [](const T* p) __attribute__((always_inline)) { return load_lanes(p); });
  if (i < row)
    reduce(
        i, [&](const T* p) __attribute__((always_inline)) { return load_part(p, row - i); });
  float sum = 0;
  for (const Lanes::Part& own : poison.part)
    for (int l = 0; l < Lanes::width; ++l) sum += own[l];
  return sum == 0;
}

// Over their widths.
template <typename T>
void reduce_columns(const float* columns, int64_t channels, const PoolShape& s, T* y) {
  for (int64_t o = 0; o < s.output[1]; ++o, y += channels) {
    const int64_t left = s.start(1, o), first = s.first_tap(1, left), count = s.end_tap(1, left) - first;
    const float* from = columns + (left + first * s.dilation[1]) * channels;
    for (int64_t i = 0; i < channels; i += lanes) {
      Lanes most = load_lanes(from + i);
      for (int64_t c = 1; c < count; ++c) most = higher(load_lanes(from + c * s.dilation[1] * channels + i), most);
      i + lanes <= channels ? store_lanes(most, y + i) : store_part(most, y + i, channels - i);
    }
  }
}

template <typename T>
void pool_row(const void* x, int64_t channels, const PoolShape& s, int64_t place, void* y, uint8_t* offsets, void* scratch) {
  const T* source = static_cast<const T*>(x);
  T* target = static_cast<T*>(y);
  if (offsets) return pool_pixels<T, true>(source, channels, s, place, target, offsets);
  if (!reduce_rows(source, channels, s, place, static_cast<float*>(scratch)))
    return pool_pixels<T, false>(source, channels, s, place, target, nullptr);
  reduce_columns(static_cast<const float*>(scratch), channels, s, target);
}

#define QUANTIZE_MAX_POOL_KERNELS                                                                            \
  {                                                                                                          \
    {pool_plane<F32>, pool_row<F32>}, {pool_plane<F16>, pool_row<F16>}, { pool_plane<BF16>, pool_row<BF16> } \
  }

}  // namespace
}  // namespace quantize::layers
