// The body of sign_mask_kernels.h, included by one file per ISA.
#pragma once

#include "../core/lane_mask.h"
#include "sign_mask_kernels.h"

namespace quantize::activation {
namespace {

// Bits of whole bytes, of which `count` lanes have some.
QUANTIZE_INLINE void store_bits(unsigned bits, int64_t count, uint8_t* mask) {
  mask[0] = uint8_t(bits);
  if (count > 8) mask[1] = uint8_t(bits >> 8);
}

template <typename T>
void clip_lanes(const void* source, int64_t n, Clip clip, void* target, uint8_t* mask) {
  const T* x = static_cast<const T*>(source);
  T* y = static_cast<T*>(target);
  const auto some = [&](Lanes v, Lanes & result) __attribute__((always_inline)) {
    const LaneMask low = at_most(v, clip.low), high = at_most(clip.high, v);
    const Lanes below = clip.slope == 0.f ? Lanes(clip.low) : v * clip.slope;
    result = choose(low, below, choose(high, clip.high, v));
    return ~bits_of(low | high);
  };
  Lanes result;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const unsigned bits = some(load_lanes(x + i), result);
    store_lanes(result, y + i);
    store_bits(bits, lanes, mask + i / 8);
  }
  if (i == n) return;
  const unsigned bits = some(load_part(x + i, n - i), result) & ((1u << (n - i)) - 1);
  store_part(result, y + i, n - i);
  store_bits(bits, n - i, mask + i / 8);
}

template <typename T>
void apply_lanes(const void* source, const uint8_t* mask, int64_t n, float on, float off, void* target) {
  const T* grad = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  const auto some = [&](Lanes g, unsigned bits) __attribute__((always_inline)) {
    return choose(mask_of(bits), on == 0.f ? Lanes(0.f) : g * on, off == 0.f ? Lanes(0.f) : g * off);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_lanes(some(load_lanes(grad + i), mask[i / 8] | unsigned(mask[i / 8 + 1]) << 8), out + i);
  if (i == n) return;
  const unsigned bits = mask[i / 8] | (n - i > 8 ? unsigned(mask[i / 8 + 1]) << 8 : 0);
  store_part(some(load_part(grad + i, n - i), bits), out + i, n - i);
}

template <typename T>
constexpr MaskKernels mask_kernels_of{clip_lanes<T>, apply_lanes<T>};

#define QUANTIZE_MASK_KERNELS \
  { mask_kernels_of<F32>, mask_kernels_of<F16>, mask_kernels_of<BF16> }

}  // namespace
}  // namespace quantize::activation
