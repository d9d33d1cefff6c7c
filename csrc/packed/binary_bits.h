// Binary layers: what every backend shares. Weights are signs, a bit each (1 = -1). Inputs are signs too, or (`unit`) 0 and 1.
//
// With p = popcount(x ^ w) over the K bits of a row: signs have dot = K - 2p, and {0, 1} have dot = p - popcount(w), since a bit counts as
// +1 where x = 1 meets w = +1, as -1 where it meets w = -1. Padding is the value zero: taps outside of the image add nothing to dot.
#pragma once

#include "../core/half.h"

namespace quantize::packed {

// The bit of an input. Batch norm and sign are one comparison; a negative slope flips it. NaN is below nothing: it gives `flip`.
QUANTIZE_HOST_DEVICE bool binary_bit(float x, float threshold, bool flip) { return (x < threshold) != flip; }

// offset: of signs K less the bits of taps outside of the image (whose popcount counts as 0), of {0, 1} -popcount(w).
QUANTIZE_HOST_DEVICE int32_t binary_dot(bool unit, int32_t count, int32_t offset) { return unit ? count + offset : offset - 2 * count; }

// Two roundings, no fma. A layer without bias adds 0.
QUANTIZE_HOST_DEVICE float binary_value(int32_t dot, float scale, float bias) { return float(dot) * scale + bias; }

// The bit that the next binary layer reads.
QUANTIZE_HOST_DEVICE bool binary_next_bit(int32_t dot, int32_t threshold, bool flip) { return (dot < threshold) != flip; }

// How many of a row's weights are -1, from their sum.
QUANTIZE_HOST_DEVICE int32_t binary_ones(int32_t length, int32_t sum) { return (length - sum) / 2; }

}  // namespace quantize::packed
