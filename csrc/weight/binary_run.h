// The body of binary_kernels.h, included by one file per ISA.
//
// Sixteen channels with all their taps are a tile: place q of it is always tap q % taps, so that means need no gather at any number of
// taps, and each place of a tile of sums is one of its tap's sixteen partial sums.
#pragma once

#include <algorithm>

#include "../core/lanes.h"
#include "binary_kernels.h"

namespace quantize::weight {
namespace {

// body(element, place in the tile, elements left) for every sixteen of a row.
template <typename Body>
QUANTIZE_INLINE void for_tiles(BinaryShape shape, const Body& body) {
  const int64_t n = shape.elements(), tile = binary_sums * shape.taps;
  for (int64_t begin = 0; begin < n; begin += tile)
    for (int64_t q = 0; q < tile && begin + q < n; q += lanes) body(begin + q, q, n - begin - q);
}

// Zero from lane `count` on.
QUANTIZE_INLINE Lanes leading_lanes(Lanes v, int64_t count) {
  if (count >= lanes) return v;
  float values[lanes];
  store_lanes(v, values);
  for (int64_t l = count; l < lanes; ++l) values[l] = 0.f;
  return load_lanes(values);
}

QUANTIZE_INLINE void repeat_means(BinaryShape shape, const float* mean, float* tile) {
  for (int l = 0; l < binary_sums; ++l) std::copy(mean, mean + shape.taps, tile + l * shape.taps);
}

// mean[j] of what the tile has gathered.
QUANTIZE_INLINE void means_of(BinaryShape shape, const float* tile, float* mean) {
  for (int64_t j = 0; j < shape.taps; ++j) {
    float part[binary_sums];
    for (int l = 0; l < binary_sums; ++l) part[l] = tile[l * shape.taps + j];
    mean[j] = sum_of(load_lanes(part)) / float(shape.channels);
  }
}

template <typename T>
void centre_row(const void* source, BinaryShape shape, float* mean, float* tile) {
  const T* w = static_cast<const T*>(source);
  std::fill(tile, tile + binary_sums * shape.taps, 0.f);
  if (shape.centred)
    for_tiles(
        shape, [&](int64_t i, int64_t q, int64_t left)
                   __attribute__((always_inline)) { store_lanes(load_lanes(tile + q) + load_part(w + i, left), tile + q); });
  means_of(shape, tile, mean);
}

template <typename T>
float magnitude_of_row(const void* source, BinaryShape shape, const float* mean, float limit, float* tile) {
  const T* w = static_cast<const T*>(source);
  repeat_means(shape, mean, tile);
  Lanes total = 0.f, poison = 0.f;
  for_tiles(
      shape, [&](int64_t i, int64_t q, int64_t left) __attribute__((always_inline)) {
        const Lanes v = load_part(w + i, left);
        total += leading_lanes(lower(magnitude(v - load_lanes(tile + q)), limit), left), poison += v * 0.f;
      });
  return sum_of(total) + sum_of(poison);
}

template <typename T>
void write_row(const void* source, BinaryShape shape, const float* mean, float scale, float* tile, void* target) {
  const T* w = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  repeat_means(shape, mean, tile);
  for_tiles(
      shape, [&](int64_t i, int64_t q, int64_t left) __attribute__((always_inline)) {
        store_part(with_sign(scale, load_part(w + i, left) - load_lanes(tile + q)), y + i, left);
      });
}

// binary_slope for each lane.
QUANTIZE_INLINE Lanes slopes_of(Lanes g, Lanes v, float scale, float common, float limit) {
  const Lanes whole = g * scale + with_sign(common, v), m = magnitude(v);
  Lanes slope;
  for (int p = 0; p < Lanes::parts; ++p) slope.part[p] = m.part[p] > limit ? Lanes::Part{} : whole.part[p];
  return slope;
}

template <typename T>
void binary_row_backward(const void* gradient, const void* source, BinaryShape shape, const float* mean, float scale, float limit,
                         float factor, float* tile, float* sums, void* target) {
  const T *g = static_cast<const T*>(gradient), *w = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  repeat_means(shape, mean, tile);
  Lanes total = 0.f;
  for_tiles(
      shape, [&](int64_t i, int64_t q, int64_t left) __attribute__((always_inline)) {
        total += with_sign(load_part(g + i, left), load_part(w + i, left) - load_lanes(tile + q));
      });
  const float common = sum_of(total) / float(shape.elements());
  std::fill(sums, sums + binary_sums * shape.taps, 0.f);
  if (shape.centred) {
    for_tiles(
        shape, [&](int64_t i, int64_t q, int64_t left) __attribute__((always_inline)) {
          const Lanes v = load_part(w + i, left) - load_lanes(tile + q);
          store_lanes(load_lanes(sums + q) + leading_lanes(slopes_of(load_part(g + i, left), v, scale, common, limit), left), sums + q);
        });
    means_of(shape, sums, sums);  // a tap's sums are read before its mean takes the place of one of them
    for (int l = 1; l < binary_sums; ++l) std::copy(sums, sums + shape.taps, sums + l * shape.taps);
  }
  for_tiles(
      shape, [&](int64_t i, int64_t q, int64_t left) __attribute__((always_inline)) {
        const Lanes v = load_part(w + i, left) - load_lanes(tile + q);
        store_part((slopes_of(load_part(g + i, left), v, scale, common, limit) - load_lanes(sums + q)) * factor, out + i, left);
      });
}

template <typename T>
constexpr BinaryKernels binary_of{centre_row<T>, magnitude_of_row<T>, write_row<T>, binary_row_backward<T>};

}  // namespace
}  // namespace quantize::weight
