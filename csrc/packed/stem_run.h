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
constexpr int most_tiles = 14, most_panels = 2;  // 28 registers of sums
#else
constexpr int most_tiles = 6, most_panels = 1;  // 12
#endif

void transform(const float* line, const StemLines& s, int64_t odd_pixels, float* apart, float* v) {
  constexpr int period = tile * StemTraits::step;
  const int64_t pitch = s.pitch + 16;
  for (int64_t t = 0; t <= s.tiles; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < period; ++r) apart[r * pitch + t] = line[t * period + r];
  for (int odd = 0; odd < 2; ++odd)
    for (int64_t t = 0; t < s.tiles; t += lanes) {
      Lanes d[points], f[5], g[4];
#pragma GCC unroll 8
      for (int j = 0; j < points; ++j) d[j] = load_lanes(apart + (2 * j + odd) % period * pitch + t + (2 * j + odd) / period);
#pragma GCC unroll 8
      for (int k = 0; k < 5; ++k) f[k] = d[k + 2] - Lanes(4.f) * d[k];
#pragma GCC unroll 4
      for (int k = 1; k < 4; ++k) g[k] = d[k + 2] - d[k];
      // Products of (x - p) over the other points p, as sums over the coefficients' pixels.
      const Lanes half(0.5f), one = f[2] - half * f[1], one_on = f[3] - half * f[2], two = g[2] - half * g[1], two_on = g[3] - half * g[2];
      const Lanes all = f[3] - f[1], all_before = f[2] - f[0], all_on = f[4] - f[2], twice = two + two;
      const Lanes out[points] = {all - half * all_before, one_on + one, one_on - one,       two_on + twice,
                                 two_on - twice,          all,          all_on - half * all};
#pragma GCC unroll 8
      for (int p = 0; p < points; ++p) store_lanes(out[p], v + p * s.depth * s.pitch + odd * odd_pixels + t);
    }
}

// Sums [point][tiles][panels] of `tiles` tiles.
template <int tiles, int panels>
void multiply_tiles(const float* const* v, int64_t first, const StemLines& s, const float* weights, float* sums) {
  const int64_t panel = s.steps() * columns;
  for (int p = 0; p < points; ++p) {
    const int64_t depth = p < points - 1 ? s.depth : s.last;
    Lanes sum[tiles][panels];
#pragma GCC unroll 14
    for (int t = 0; t < tiles; ++t)
      for (Lanes& own : sum[t]) own = 0.f;
    for (int64_t l = 0; l < s.count; ++l) {
      const float* x = v[l] + p * s.depth * s.pitch + first;
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

// Seven sums to four outputs.
void finish_tiles(const float* sums, int64_t tiles, int64_t panels, const float* bias, int64_t pitch, float* out) {
  const int64_t point = tiles * panels * columns;
  for (int64_t i = 0; i < panels; ++i) {
    const Lanes more = load_lanes(bias + i * columns);
    for (int64_t t = 0; t < tiles; ++t) {
      const float* from = sums + (t * panels + i) * columns;
      Lanes m[points];
#pragma GCC unroll 8
      for (int p = 0; p < points; ++p) m[p] = load_lanes(from + p * point);
      const Lanes one = m[1] + m[2], one_odd = m[1] - m[2], two = m[3] + m[4], two_odd = m[3] - m[4];
      float* to = out + t * tile * pitch + i * columns;
      store_lanes(m[0] + one + two + m[5] + more, to);
      store_lanes(one_odd + Lanes(2.f) * two_odd + Lanes(0.5f) * m[5] + more, to + pitch);
      store_lanes(one + Lanes(4.f) * two + Lanes(0.25f) * m[5] + more, to + 2 * pitch);
      store_lanes(one_odd + Lanes(8.f) * two_odd + Lanes(0.125f) * m[5] + m[6] + more, to + 3 * pitch);
    }
  }
}

using MultiplyTiles = decltype(&multiply_tiles<1, 1>);
template <int panels, int... tiles>
MultiplyTiles multiply_of(int64_t count, std::integer_sequence<int, tiles...>) {
  constexpr MultiplyTiles of[] = {multiply_tiles<tiles + 1, panels>...};
  return of[count - 1];
}

void multiply(const float* const* v, const StemLines& s, const float* weights, const float* bias, int64_t panels, float* sums, float* out) {
  const auto each = std::make_integer_sequence<int, most_tiles>();
  const int64_t pitch = panels * columns;
  for (int64_t n = 0; n < panels; n += most_panels) {
    const int64_t together = std::min<int64_t>(most_panels, panels - n);
    const float* own = weights + n * s.steps() * columns;
    // Parts of a line as even as can be.
    for (int64_t parts = (s.tiles + most_tiles - 1) / most_tiles, t = 0; parts > 0; --parts) {
      const int64_t some = (s.tiles - t + parts - 1) / parts;
      (together == most_panels ? multiply_of<most_panels>(some, each) : multiply_of<1>(some, each))(v, t, s, own, sums);
      finish_tiles(sums, some, together, bias + n * columns, pitch, out + t * tile * pitch + n * columns);
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

constexpr StemKernels stem_of_isa{transform, multiply, points* most_tiles* most_panels* columns, turn};

}  // namespace
}  // namespace quantize::packed
