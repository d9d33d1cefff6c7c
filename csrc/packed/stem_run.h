// The body of stem_kernels.h, included by one file per ISA.
#pragma once

#include <algorithm>
#include <utility>

#include "../core/lanes.h"
#include "stem_kernels.h"

#ifdef __AVX512F__
#include "../core/transpose_avx512.h"
#endif

namespace quantize::packed {
namespace {

constexpr int points = StemTraits::points, columns = StemTraits::columns, tile = StemTraits::tile;
static_assert(columns == lanes);
#ifdef __AVX512F__
constexpr int most_tiles = 7, most_panels = 2;  // 14 registers of sums
#else
constexpr int most_tiles = 6, most_panels = 1;  // 12
#endif
constexpr int most_together = most_tiles * most_panels;

// Products of (x - p) over the other points p, as sums over the coefficients' pixels.
QUANTIZE_INLINE void to_points(const Lanes (&d)[points], Lanes (&out)[points]) {
  Lanes f[5], g[4];
#pragma GCC unroll 8
  for (int k = 0; k < 5; ++k) f[k] = d[k + 2] - Lanes(4.f) * d[k];
#pragma GCC unroll 4
  for (int k = 1; k < 4; ++k) g[k] = d[k + 2] - d[k];
  const Lanes half(0.5f), one = f[2] - half * f[1], one_on = f[3] - half * f[2], two = g[2] - half * g[1], two_on = g[3] - half * g[2];
  const Lanes all = f[3] - f[1], all_before = f[2] - f[0], all_on = f[4] - f[2], twice = two + two;
  out[0] = all - half * all_before, out[1] = one_on + one, out[2] = one_on - one, out[3] = two_on + twice;
  out[4] = two_on - twice, out[5] = all, out[6] = all_on - half * all;
}

// Seven sums to four outputs.
QUANTIZE_INLINE void to_outputs(const Lanes (&m)[points], Lanes (&out)[tile]) {
  const Lanes one = m[1] + m[2], one_odd = m[1] - m[2], two = m[3] + m[4], two_odd = m[3] - m[4];
  out[0] = m[0] + one + two + m[5];
  out[1] = one_odd + Lanes(2.f) * two_odd + Lanes(0.5f) * m[5];
  out[2] = one + Lanes(4.f) * two + Lanes(0.25f) * m[5];
  out[3] = one_odd + Lanes(8.f) * two_odd + Lanes(0.125f) * m[5] + m[6];
}

void transform(const float* line, const StemSizes& s, int64_t odd_pixels, float* apart, float* v) {
  constexpr int period = tile * StemTraits::step;
  const int64_t pitch = s.pitch + 16;
  for (int64_t t = 0; t <= s.tiles; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < period; ++r) apart[r * pitch + t] = line[t * period + r];
  for (int odd = 0; odd < 2; ++odd)
    for (int64_t t = 0; t < s.tiles; t += lanes) {
      Lanes d[points], out[points];
#pragma GCC unroll 8
      for (int j = 0; j < points; ++j) d[j] = load_lanes(apart + (2 * j + odd) % period * pitch + t + (2 * j + odd) / period);
      to_points(d, out);
#pragma GCC unroll 8
      for (int p = 0; p < points; ++p) store_lanes(out[p], v + p * s.depth * s.pitch + odd * odd_pixels + t);
    }
}

void transform_lines(const float* const* from, const StemSizes& s, float* v) {
  const int64_t line = s.line();
  for (int odd = 0; odd < 2; ++odd)
    for (int64_t i = 0; i < line; i += lanes) {
      Lanes d[points], out[points];
#pragma GCC unroll 8
      for (int j = 0; j < points; ++j) d[j] = load_lanes(from[2 * j + odd] + i);
      to_points(d, out);
#pragma GCC unroll 8
      for (int p = 0; p < points; ++p) store_lanes(out[p], v + (2 * p + odd) * line + i);
    }
}

// Sums [point][tiles][panels] of `tiles` tiles, of one point across the lines. v: [lines] transformed.
template <int tiles, int panels>
void multiply_tiles(const float* v, int64_t count, const StemSizes& s, const float* weights, float* sums) {
  const int64_t panel = s.steps() * columns, line = s.line();
  for (int p = 0; p < points; ++p) {
    const int64_t depth = p < points - 1 ? s.depth : s.last;
    Lanes sum[tiles][panels];
#pragma GCC unroll 14
    for (int t = 0; t < tiles; ++t)
      for (Lanes& own : sum[t]) own = 0.f;
    for (int64_t l = 0; l < count; ++l) {
      const float* x = v + l * line + p * s.depth * s.pitch;
      for (int64_t k = 0; k < depth; ++k, x += s.pitch, weights += columns) {
        Lanes w[panels];
        for (int i = 0; i < panels; ++i) w[i] = load_lanes(weights + i * panel);
#pragma GCC unroll 14
        for (int t = 0; t < tiles; ++t) {
          const Lanes pixel(x[t]);
          for (int i = 0; i < panels; ++i) sum[t][i] = fused_multiply_add(w[i], pixel, sum[t][i]);
        }
      }
    }
#pragma GCC unroll 14
    for (int t = 0; t < tiles; ++t)
      for (int i = 0; i < panels; ++i) store_lanes(sum[t][i], sums + ((p * tiles + t) * panels + i) * columns);
  }
}

// `count` sums of each point, `point` floats apart, to those of each output of a tile.
void finish_pixels(const float* sums, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    Lanes m[points], y[tile];
#pragma GCC unroll 8
    for (int p = 0; p < points; ++p) m[p] = load_lanes(sums + (p * count + i) * columns);
    to_outputs(m, y);
#pragma GCC unroll 4
    for (int o = 0; o < tile; ++o) store_lanes(y[o], out + (o * count + i) * columns);
  }
}

// [point across lines][pixel of a tile][tiles][panels] to four lines of outputs.
void finish_lines(const float* sums, int64_t tiles, int64_t panels, int64_t n, const StemFinish& f, int64_t pixel, int64_t pitch,
                  float* out) {
  const int64_t point = tile * tiles * panels * columns;
  const Lanes low(f.low), high(f.high);
  for (int64_t o = 0; o < tile; ++o)
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t i = 0; i < panels; ++i, sums += columns) {
        const Lanes more = load_lanes(f.bias + (n + i) * columns);
        Lanes m[points], y[tile];
#pragma GCC unroll 8
        for (int p = 0; p < points; ++p) m[p] = load_lanes(sums + p * point);
        to_outputs(m, y);
#pragma GCC unroll 4
        for (int line = 0; line < tile; ++line)
          store_lanes(lower(higher(y[line] + more, low), high), out + line * pitch + (t * tile + o) * pixel + i * columns);
      }
}

using MultiplyTiles = decltype(&multiply_tiles<1, 1>);
template <int panels, int... tiles>
MultiplyTiles multiply_of(int64_t count, std::integer_sequence<int, tiles...>) {
  constexpr MultiplyTiles of[] = {multiply_tiles<tiles + 1, panels>...};
  return of[count - 1];
}

void multiply(const float* v, const StemSizes& s, const float* weights, int64_t panels, const StemFinish& f, float* sums, float* out,
              int64_t pitch) {
  const auto each = std::make_integer_sequence<int, most_tiles>();
  const int64_t pixel = panels * columns;
  float* of_pixels = sums + points * most_together * columns;
  for (int64_t n = 0; n < panels; n += most_panels) {
    const int64_t together = std::min<int64_t>(most_panels, panels - n);
    // Parts of a line as even as can be.
    for (int64_t parts = (s.tiles + most_tiles - 1) / most_tiles, t = 0; parts > 0; --parts) {
      const int64_t some = (s.tiles - t + parts - 1) / parts, count = some * together;
      const MultiplyTiles multiply = together == most_panels ? multiply_of<most_panels>(some, each) : multiply_of<1>(some, each);
      const float* own = weights + n * s.steps() * columns;
      for (int p = 0; p < points; own += s.lines(p) * s.line_steps() * columns, ++p) {
        multiply(v + p * 2 * s.line() + t, s.lines(p), s, own, sums);
        finish_pixels(sums, count, of_pixels + p * tile * count * columns);
      }
      finish_lines(of_pixels, some, together, n, f, pixel, pitch, out + t * tile * pixel + n * columns);
      t += some;
    }
  }
}

void turn(const float* row, int64_t pixels, int64_t pitch, int64_t channels, float* out, int64_t plane) {
#ifdef __AVX512F__
  for (int64_t c = 0; c < channels; c += 16)
    for (int64_t p = 0; p < pixels; p += 16) {
      const int64_t some = std::min<int64_t>(16, pixels - p), many = std::min<int64_t>(16, channels - c);
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = i < some ? _mm512_loadu_si512(row + (p + i) * pitch + c) : _mm512_setzero_si512();
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < many) _mm512_mask_storeu_epi32(out + (c + i) * plane + p, __mmask16((1u << some) - 1), v[i]);
    }
#else
  using Four = float __attribute__((vector_size(16)));
  using Places = int32_t __attribute__((vector_size(16)));
  for (int64_t c = 0; c < channels; c += 4) {
    int64_t p = 0;
    for (; p + 4 <= pixels && c + 4 <= channels; p += 4) {
      Four v[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&v[i], row + (p + i) * pitch + c, sizeof v[i]);
      const Four low = __builtin_shuffle(v[0], v[1], Places{0, 4, 1, 5}), low2 = __builtin_shuffle(v[2], v[3], Places{0, 4, 1, 5});
      const Four high = __builtin_shuffle(v[0], v[1], Places{2, 6, 3, 7}), high2 = __builtin_shuffle(v[2], v[3], Places{2, 6, 3, 7});
      const Four turned[4] = {__builtin_shuffle(low, low2, Places{0, 1, 4, 5}), __builtin_shuffle(low, low2, Places{2, 3, 6, 7}),
                              __builtin_shuffle(high, high2, Places{0, 1, 4, 5}), __builtin_shuffle(high, high2, Places{2, 3, 6, 7})};
      for (int i = 0; i < 4; ++i) std::memcpy(out + (c + i) * plane + p, &turned[i], sizeof turned[i]);
    }
    for (; p < pixels; ++p)
      for (int64_t i = c; i < c + 4 && i < channels; ++i) out[i * plane + p] = row[p * pitch + i];
  }
#endif
}

constexpr StemKernels stem_of_isa{transform, transform_lines, multiply, (1 + tile) * points* most_together* columns, turn};

}  // namespace
}  // namespace quantize::packed
