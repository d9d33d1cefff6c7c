// The body of batch_norm_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lanes.h"
#include "batch_norm_kernels.h"

namespace quantize::layers {
namespace {

static_assert(lanes == ChannelRun::slack);

// body(place in the run, channel or column, count): stretches of one channel, or of one row.
template <typename Body>
QUANTIZE_INLINE void for_each_stretch(ChannelRun run, Body body) {
  const int64_t period = run.inner ? run.inner : run.width;
  int64_t at = run.first / period, within = run.first % period;
  for (int64_t done = 0; done < run.count; ++at, within = 0) {
    const int64_t left = run.count - done, count = period - within < left ? period - within : left;
    body(done, run.inner ? at : within, count);
    done += count;
  }
}

struct Sums {
  Lanes grad, product, square;
};

template <bool squares>
QUANTIZE_INLINE void add(Sums& sums, Lanes v, Lanes g) {
  sums.grad += g, sums.product += g * v;
  if constexpr (squares) sums.square += g * g;
}

template <bool squares>
QUANTIZE_INLINE Sums load_sums(ChannelSums sums, int64_t slot) {
  return {load_lanes(sums.grad + slot), load_lanes(sums.product + slot), squares ? load_lanes(sums.square + slot) : Lanes(0.f)};
}

template <bool squares>
QUANTIZE_INLINE void store_sums(const Sums& own, ChannelSums sums, int64_t slot) {
  store_lanes(own.grad, sums.grad + slot), store_lanes(own.product, sums.product + slot);
  if constexpr (squares) store_lanes(own.square, sums.square + slot);
}

template <typename T, bool squares>
void reduce_planes(const T* x, const T* grad, ChannelRun run, ChannelSums sums) {
  for_each_stretch(run, [&](int64_t begin, int64_t channel, int64_t count) {
    Sums own[2] = {load_sums<squares>(sums, channel * lanes), {0.f, 0.f, 0.f}};
    int64_t i = begin;
    const int64_t end = begin + count;
    for (; i + 2 * lanes <= end; i += 2 * lanes)
      for (int k = 0; k < 2; ++k) add<squares>(own[k], load_lanes(x + i + k * lanes), load_lanes(grad + i + k * lanes));
    for (; i < end; i += lanes) add<squares>(own[0], load_part(x + i, end - i), load_part(grad + i, end - i));
    own[0].grad += own[1].grad, own[0].product += own[1].product, own[0].square += own[1].square;
    store_sums<squares>(own[0], sums, channel * lanes);
  });
}

template <typename T, bool squares>
QUANTIZE_INLINE void reduce_part_of_row(const T* x, const T* grad, int64_t column, int64_t count, ChannelSums sums) {
  for (int64_t i = 0; i < count; i += lanes) {
    Sums own = load_sums<squares>(sums, column + i);
    add<squares>(own, load_part(x + i, count - i), load_part(grad + i, count - i));
    store_sums<squares>(own, sums, column + i);
  }
}

// Whole rows are added up column by column, a strip at a time, with the sums in registers.
template <typename T, bool squares>
void reduce_rows(const T* x, const T* grad, ChannelRun run, ChannelSums sums) {
  constexpr int strip = 2;
  const int64_t width = run.width, column = run.first % width;
  int64_t done = column ? (width - column < run.count ? width - column : run.count) : 0;
  if (done) reduce_part_of_row<T, squares>(x, grad, column, done, sums);
  const int64_t rows = (run.count - done) / width, end = done + rows * width;
  int64_t c = 0;
  for (; c + strip * lanes <= width; c += strip * lanes) {
    Sums own[strip];
    for (int k = 0; k < strip; ++k) own[k] = load_sums<squares>(sums, c + k * lanes);
    for (int64_t i = done + c; i < end; i += width)
      for (int k = 0; k < strip; ++k) add<squares>(own[k], load_lanes(x + i + k * lanes), load_lanes(grad + i + k * lanes));
    for (int k = 0; k < strip; ++k) store_sums<squares>(own[k], sums, c + k * lanes);
  }
  if (c < width)
    for (int64_t i = done; i < end; i += width) reduce_part_of_row<T, squares>(x + i + c, grad + i + c, c, width - c, sums);
  if (end < run.count) reduce_part_of_row<T, squares>(x + end, grad + end, 0, run.count - end, sums);
}

template <typename T>
void reduce(const void* source, const void* gradient, ChannelRun run, ChannelSums sums) {
  const T *x = static_cast<const T*>(source), *grad = static_cast<const T*>(gradient);
  if (run.inner)
    sums.square ? reduce_planes<T, true>(x, grad, run, sums) : reduce_planes<T, false>(x, grad, run, sums);
  else
    sums.square ? reduce_rows<T, true>(x, grad, run, sums) : reduce_rows<T, false>(x, grad, run, sums);
}

template <typename T>
void apply(const void* source, const void* gradient, ChannelRun run, ChannelTerms terms, void* target) {
  const T *x = static_cast<const T*>(source), *grad = static_cast<const T*>(gradient);
  T* y = static_cast<T*>(target);
  if (run.inner) {
    for_each_stretch(run, [&](int64_t begin, int64_t channel, int64_t count) {
      const Lanes offset = terms.offset[channel], slope = terms.slope[channel], gain = terms.gain[channel];
      const auto value = [&](Lanes v, Lanes g) __attribute__((always_inline)) { return ((g - offset) - v * slope) * gain; };
      int64_t i = begin;
      const int64_t end = begin + count;
      for (; i + lanes <= end; i += lanes) store_lanes(value(load_lanes(x + i), load_lanes(grad + i)), y + i);
      if (i < end) store_part(value(load_part(x + i, end - i), load_part(grad + i, end - i)), y + i, end - i);
    });
    return;
  }
  for_each_stretch(run, [&](int64_t begin, int64_t column, int64_t count) {
    const auto value = [&](Lanes v, Lanes g, int64_t at) __attribute__((always_inline)) {
      return ((g - load_lanes(terms.offset + at)) - v * load_lanes(terms.slope + at)) * load_lanes(terms.gain + at);
    };
    const T *row = x + begin, *row_grad = grad + begin;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store_lanes(value(load_lanes(row + i), load_lanes(row_grad + i), column + i), y + begin + i);
    const int64_t n = count - i;
    if (n) store_part(value(load_part(row + i, n), load_part(row_grad + i, n), column + i), y + begin + i, n);
  });
}

// y = value(x, offset, gain)
template <typename T, typename Value>
QUANTIZE_INLINE void map_channels(const void* source, ChannelRun run, ChannelTerms terms, void* target, Value value) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  for_each_stretch(run, [&](int64_t begin, int64_t at, int64_t count) {
    // One channel's terms, or those of the columns from `at` on.
    const auto term = [&](const float* terms, int64_t i) __attribute__((always_inline)) {
      return run.inner ? Lanes(terms[at]) : load_lanes(terms + at + i);
    };
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      store_lanes(value(load_lanes(x + begin + i), term(terms.offset, i), term(terms.gain, i)), y + begin + i);
    if (const int64_t n = count - i)
      store_part(value(load_part(x + begin + i, n), term(terms.offset, i), term(terms.gain, i)), y + begin + i, n);
  });
}

template <typename T>
void normalize(const void* x, ChannelRun run, ChannelTerms terms, void* y) {
  map_channels<T>(
      x, run, terms, y, [](Lanes v, Lanes offset, Lanes gain) __attribute__((always_inline)) { return (v - offset) * gain; });
}

template <typename T>
void scale(const void* x, ChannelRun run, ChannelTerms terms, void* y) {
  map_channels<T>(
      x, run, terms, y, [](Lanes v, Lanes offset, Lanes gain) __attribute__((always_inline)) { return v * gain + offset; });
}

template <typename T>
constexpr BatchNormKernels batch_norm_of_type{reduce<T>, apply<T>, normalize<T>, scale<T>};

#define QUANTIZE_BATCH_NORM_KERNELS \
  { batch_norm_of_type<F32>, batch_norm_of_type<F16>, batch_norm_of_type<BF16> }

}  // namespace
}  // namespace quantize::layers
