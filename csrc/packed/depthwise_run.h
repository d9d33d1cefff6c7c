// The body of depthwise_kernels.h, included by one file per ISA.
#pragma once

#include "depthwise_kernels.h"
#include "level_codes.h"

namespace quantize::packed {
namespace {

static_assert(lanes == DepthwiseTraits::lanes);

// And up to lanes - 1 more.
QUANTIZE_INLINE void zeros(float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes) store_lanes(0.f, p + i);
}

void fill_plane(const float* x, const Units& units, int64_t first, LsqRange range, float* buffer, float* line) {
  const Units u = units;  // which stores might change, for all that the compiler knows
  const int64_t width = u.size[1], left = std::min(u.padding[1], u.extent[1]), inside = std::min(width, u.extent[1] - left);
  const float* end = x + u.size[0] * width;
  const bool pairs = u.stride[1] == 2 && u.phases[1] == 2;
  const auto levels = [&](const float* from) __attribute__((always_inline)) { return levels_of(load_part(from, end - from), range); };
  const auto quantize_row = [&](const float* from, float* to) __attribute__((always_inline)) {
    zeros(to, left);
    for (int64_t i = 0; i < inside; i += lanes) store_lanes(levels(from + i), to + left + i);
    zeros(to + left + inside, u.extent[1] - left - inside);
  };
  // The same, every other column here and there: the input's first column is column `left`.
  const auto quantize_pairs = [&](const float* from, float* first_phase, float* second_phase) __attribute__((always_inline)) {
    float *even = (left % 2 ? second_phase : first_phase) + left / 2, *odd = (left % 2 ? first_phase : second_phase) + (left + 1) / 2;
    zeros(first_phase, (left + 1) / 2), zeros(second_phase, left / 2);
    for (int64_t i = 0; i < inside; i += 2 * lanes) {
      Lanes own, next;
      split_pairs(levels(from + i), i + lanes < inside ? levels(from + i + lanes) : Lanes(0.f), own, next);
      store_lanes(own, even + i / 2), store_lanes(next, odd + i / 2);
    }
    float* behind[] = {even + (inside + 1) / 2, odd + inside / 2};
    float *first_end = first_phase + (u.extent[1] + 1) / 2, *second_end = second_phase + u.extent[1] / 2;
    zeros(behind[left % 2], first_end - behind[left % 2]), zeros(behind[1 - left % 2], second_end - behind[1 - left % 2]);
  };
  const auto fill = [&](int64_t phase, int64_t index, int64_t y) __attribute__((always_inline)) {
    if (y < 0 || y >= u.size[0]) {
      for (int64_t c = 0; c < u.phases[1]; ++c) zeros(buffer + u.row(phase, c, index), u.each[1]);
      return;
    }
    if (u.stride[1] == 1) return quantize_row(x + y * width, buffer + u.row(phase, 0, index));
    if (pairs) return quantize_pairs(x + y * width, buffer + u.row(phase, 0, index), buffer + u.row(phase, 1, index));
    quantize_row(x + y * width, line);
    for (int64_t c = 0; c < u.phases[1]; ++c) {
      float* to = buffer + u.row(phase, c, index);
      for (int64_t i = c; i < u.extent[1]; i += u.stride[1]) *to++ = line[i];
    }
  };
  // As they lie in the buffer: what a row's last vector leaves behind it is overwritten by the next one.
  for (int64_t phase = 0; phase < u.phases[0]; ++phase)
    for (int64_t index = 0, r = phase; r < u.extent[0]; ++index, r += u.stride[0])
      fill(phase, index, first * u.stride[0] - u.padding[0] + r);
}

// levels(p): those of sixteen channels of a pixel at p.
template <typename T, typename Levels>
QUANTIZE_INLINE void fill_pixels(const T* x, int64_t pixel, int64_t channels, const Units& units, float* buffer, const Levels& levels) {
  const Units u = units;
  const int64_t width = u.size[1], left = u.padding[1], stop = u.extent[1] - left, stride = u.stride[1], chunk = u.chunk();
  for (int64_t phase = 0; phase < u.phases[1]; ++phase) {
    float* to = buffer + phase * u.each[1] * lanes;
    int64_t c = phase - left;
    const auto fill_up = [&](int64_t until) __attribute__((always_inline)) {
      for (; c < until; c += stride, to += lanes)
        for (int64_t i = 0, at = 0; i < channels; i += lanes, at += chunk) store_lanes(0.f, to + at);
    };
    fill_up(x ? std::min<int64_t>(0, stop) : stop);
    for (const int64_t until = std::min(width, stop); c < until; c += stride, to += lanes)
      for (int64_t i = 0, at = 0; i < channels; i += lanes, at += chunk) {
        store_lanes(levels(x + c * pixel + i), to + at);
      }
    fill_up(stop);
  }
}

void fill_row(const float* x, const float* end, int64_t pixel, int64_t channels, const Units& units, LsqRange range, float* buffer) {
  fill_pixels(
      x, pixel, channels, units,
      buffer, [&](const float* p) __attribute__((always_inline)) { return levels_of(load_part(p, end - p), range); });
}

void fill_row_of_codes(const uint8_t* x, const uint8_t* end, int64_t pixel, int64_t channels, const Units& units, float zero_point,
                       float* buffer) {
  fill_pixels(
      x, pixel, channels, units, buffer, [&](const uint8_t* p) __attribute__((always_inline)) {
        uint8_t rest[lanes] = {};
        if (end - p < lanes) {
          for (int l = 0; l < int(end - p); ++l) rest[l] = p[l];
          p = rest;
        }
        return load_bytes(p) - zero_point;
      });
}

void copy_rows(const float* from, int64_t pitch, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r + 1 < rows; ++r)  // what is left behind a row the next one overwrites, unless it is too short
    for (int64_t i = 0; i < width; i += lanes) {
      const Lanes v = load_lanes(from + r * pitch + i);
      if (i + lanes <= (rows - r) * width)
        store_lanes(v, to + r * width + i);
      else
        store_part(v, reinterpret_cast<F32*>(to + r * width + i), width - i);
    }
  std::copy_n(from + (rows - 1) * pitch, width, to + (rows - 1) * width);
}

struct Taps {
  const int64_t* offsets;
  int64_t count;
  const float* weights;
  int64_t pitch;  // of the weights
};

// The next `together` vectors while there are so many.
template <int together, typename Store>
QUANTIZE_INLINE void sum_vectors(const float* x, int64_t& i, int64_t vectors, const Taps& taps, const Store& store) {
  for (; i + together <= vectors; i += together) {
    Lanes acc[together];
    for (Lanes& own : acc) own = 0.f;
    for (int64_t t = 0; t < taps.count; ++t) {
      const float* from = x + i * lanes + taps.offsets[t];
      const Lanes weight = load_lanes(taps.weights + t * taps.pitch);
      for (int j = 0; j < together; ++j) acc[j] = exact_multiply_add(acc[j], load_lanes(from + j * lanes), weight);
    }
    for (int j = 0; j < together; ++j) store(acc[j], i + j);
  }
}

template <typename Store>
QUANTIZE_INLINE void sum_all(const float* x, int64_t vectors, const Taps& taps, const Store& store) {
  constexpr int most = Lanes::parts == 1 ? 8 : Lanes::parts == 2 ? 4 : 2;  // what the registers hold
  int64_t i = 0;
  sum_vectors<most>(x, i, vectors, taps, store);
  if constexpr (most > 2) sum_vectors<most / 2>(x, i, vectors, taps, store);
  if constexpr (most > 4) sum_vectors<2>(x, i, vectors, taps, store);
  sum_vectors<1>(x, i, vectors, taps, store);
}

void sum(const float* x, int64_t vectors, const int64_t* offsets, int64_t taps, const float* weights, int64_t weight_pitch,
         const float* gain, const float* bias, float* out, int64_t stride, int64_t count) {
  const Lanes scale = load_lanes(gain), shift = load_lanes(bias);
  const Taps all{offsets, taps, weights, weight_pitch};
  if (count == lanes)
    sum_all(
        x, vectors, all, [&](Lanes v, int64_t i) __attribute__((always_inline)) { store_lanes(v * scale + shift, out + i * stride); });
  else
    sum_all(
        x, vectors, all, [&](Lanes v, int64_t i) __attribute__((always_inline)) {
          store_part(v * scale + shift, reinterpret_cast<F32*>(out + i * stride), count);
        });
}

void sum_codes(const float* x, int64_t vectors, const int64_t* offsets, int64_t taps, const float* weights, int64_t weight_pitch,
               const float* gain, const float* bias, LsqRange range, int32_t zero_point, uint8_t* out, int64_t stride, int64_t count) {
  const Lanes scale = load_lanes(gain), shift = load_lanes(bias);
  const Taps all{offsets, taps, weights, weight_pitch};
  if (count >= lanes) {
    sum_all(
        x, vectors, all, [&](Lanes v, int64_t i) __attribute__((always_inline)) {
          store_codes(v * scale + shift, range, zero_point, out + i * stride);
        });
    return;
  }
  sum_all(
      x, vectors, all, [&](Lanes v, int64_t i) __attribute__((always_inline)) {
        uint8_t bytes[lanes];
        store_codes(v * scale + shift, range, zero_point, bytes);
        store_words(bytes, count, out + i * stride);
      });
}

constexpr DepthwiseKernels depthwise_of_isa{fill_plane, fill_row, fill_row_of_codes, sum, sum_codes, copy_rows};

}  // namespace
}  // namespace quantize::packed
