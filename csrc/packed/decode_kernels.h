// CPU kernels of decode_weight: a row of codes to floats. Torch-free.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

// out[k] = scale * levels[code k], k < columns. codes: bits (1, 2, 4 or 8) each, the first in the low bits; readable to a multiple of 8
// bytes. levels: [max(16, 2^bits)].
using DecodeRow = void (*)(const uint8_t* codes, int bits, int64_t columns, const float* levels, float scale, float* out);

extern const DecodeRow decode_row_portable, decode_row_avx2, decode_row_avx512;

inline DecodeRow decode_row() { return QUANTIZE_BY_ISA(cpu_isa(), decode_row); }

}  // namespace quantize::packed
