// The body of channel_quantize_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lanes.h"
#include "channel_quantize_kernels.h"

namespace quantize::weight {
namespace {

// level_of for each lane.
template <bool power_of_two>
QUANTIZE_INLINE Lanes levels_of(Lanes t, const Codebook& book) {
  if constexpr (!power_of_two) return lower((t + 12582912.f) - 12582912.f, book.anchor);
  Lanes rounded;
  for (int i = 0; i < Lanes::parts; ++i) rounded.part[i] = (Lanes::Part)(((Lanes::Whole)t.part[i] + int32_t(book.carry)) & 0x7f800000);
  Lanes q = higher(lower(rounded, 1.f), book.lowest);
  const float half = 0.5f * book.lowest;
  for (int i = 0; i < Lanes::parts; ++i) q.part[i] = t.part[i] <= half ? Lanes::Part{} : q.part[i];
  return q;
}

template <typename T>
float largest_magnitude(const T* w, int64_t n) {  // NaN if any is NaN or infinite
  Lanes high = 0.f, poison = 0.f;
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(w + i, n - i);
    high = higher(high, magnitude(v)), poison += v * 0.f;
  }
  return reduce_lanes(high, [](auto a, auto b) { return b > a ? b : a; }) + sum_of(poison);
}

template <bool power_of_two, typename T>
ChannelScale quantize_levels(const T* w, int64_t n, const Codebook& book, T* y, float largest) {
  const float unit = 1.f / largest;
  float best = -1.f, product = 1.f, square = 1.f, ratio = book.ratio[0];
  for (int c = 0; c < book.candidates && book.least_squares; ++c) {
    const float inverse = book.anchor / (largest * book.ratio[c]);
    Lanes products = 0.f, squares = 0.f;
    for (int64_t i = 0; i < n; i += lanes) {
      const Lanes v = magnitude(load_part(w + i, n - i)), q = levels_of<power_of_two>(v * inverse, book);
      products += v * unit * q, squares += q * q;
    }
    const float p = sum_of(products), s = sum_of(squares), part = part_explained(p, s);
    if (part > best) best = part, product = p, square = s, ratio = book.ratio[c];
  }
  const ChannelScale scale = channel_scale(largest, ratio, product, square, book);
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(w + i, n - i);
    store_part(with_sign(levels_of<power_of_two>(magnitude(v) * scale.inverse, book) * scale.step, v), y + i, n - i);
  }
  return scale;
}

template <typename T>
ChannelScale quantize_ternary(const T* w, int64_t n, T* y) {
  Lanes total = 0.f, above = 0.f, count = 0.f;
  for (int64_t i = 0; i < n; i += lanes) total += magnitude(load_part(w + i, n - i));
  const float threshold = ternary_threshold(sum_of(total), n);
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes m = magnitude(load_part(w + i, n - i));
    for (int p = 0; p < Lanes::parts; ++p) {
      const auto kept = m.part[p] > threshold;
      above.part[p] += kept ? m.part[p] : Lanes::Part{};
      count.part[p] += kept ? Lanes::Part{} + 1.f : Lanes::Part{};
    }
  }
  const ChannelScale scale = ternary_scale(sum_of(above), sum_of(count));
  for (int64_t i = 0; i < n; i += lanes) {
    const Lanes v = load_part(w + i, n - i), m = magnitude(v);
    Lanes q;
    for (int p = 0; p < Lanes::parts; ++p) q.part[p] = m.part[p] > threshold ? Lanes::Part{} + scale.step : Lanes::Part{};
    store_part(with_sign(q, v), y + i, n - i);
  }
  return scale;
}

template <typename T>
ChannelScale quantize_channel(const void* source, int64_t n, const Codebook& book, void* target) {
  const T* w = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  const float largest = largest_magnitude(w, n);
  if (largest == largest && book.ternary) return quantize_ternary(w, n, y);
  if (largest == largest && !is_zero_channel(largest, book))
    return book.power_of_two ? quantize_levels<true>(w, n, book, y, largest) : quantize_levels<false>(w, n, book, y, largest);
  const ChannelScale scale = largest == largest ? zero_channel() : poisoned_channel();
  for (int64_t i = 0; i < n; ++i) y[i] = round_nearest(scale.step, T{});
  return scale;
}

template <typename T>
void clip_channel(const void* grad, const void* w, int64_t n, float limit, void* target) {
  const T *g = static_cast<const T*>(grad), *x = static_cast<const T*>(w);
  T* y = static_cast<T*>(target);
  for (int64_t i = 0; i < n; i += lanes) {
    Lanes v = load_part(g + i, n - i), m = magnitude(load_part(x + i, n - i));
    for (int p = 0; p < Lanes::parts; ++p) v.part[p] = m.part[p] <= limit ? v.part[p] : Lanes::Part{};
    store_part(v, y + i, n - i);
  }
}

template <typename T>
constexpr ChannelQuantizeKernels channel_quantize_of{quantize_channel<T>, clip_channel<T>};

}  // namespace
}  // namespace quantize::weight
