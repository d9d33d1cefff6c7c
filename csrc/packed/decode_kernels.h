// CPU kernels of decode_weight and decode_groups: codes to floats. Torch-free.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

// out[k] = scale * levels[code k], k < columns. codes: bits (1, 2, 4 or 8) each, the first in the low bits; readable to a multiple of 8
// bytes. levels: [max(16, 2^bits)].
using DecodeRow = void (*)(const uint8_t* codes, int bits, int64_t columns, const float* levels, float scale, float* out);

extern const DecodeRow decode_row_portable, decode_row_avx2, decode_row_avx512;

inline DecodeRow decode_row() { return QUANTIZE_BY_ISA(cpu_isa(), decode_row); }

// out[i] = low + value * range / (2^bits - 1) of weights [begin, end), bits by group (group_codes.h) and (low, range) by `span` weights.
using DecodeGroups = void (*)(const void* values, const uint8_t* group_bits, const float* scales, int64_t begin, int64_t end,
                              int64_t group_size, int64_t span, float* out);

// Of bytes, and of 16 bits.
extern const DecodeGroups decode_groups_portable[2], decode_groups_avx2[2], decode_groups_avx512[2];

inline DecodeGroups decode_groups(int bytes) { return QUANTIZE_BY_ISA(cpu_isa(), decode_groups)[bytes - 1]; }

}  // namespace quantize::packed
