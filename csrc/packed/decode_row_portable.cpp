// A row of codes to floats, for any processor.
#include "decode_kernels.h"

namespace quantize::packed {
namespace {

template <int bits>
void decode(const uint8_t* codes, int64_t columns, const float* levels, float scale, float* out) {
  constexpr int share = 8 / bits, mask = (1 << bits) - 1;
  int64_t k = 0;
  for (; k + share <= columns; k += share, ++codes)
    for (int s = 0; s < share; ++s) out[k + s] = scale * levels[(*codes >> (s * bits)) & mask];
  for (int s = 0; k < columns; ++k, ++s) out[k] = scale * levels[(*codes >> (s * bits)) & mask];
}

void decode_row(const uint8_t* codes, int bits, int64_t columns, const float* levels, float scale, float* out) {
  if (bits == 8) return decode<8>(codes, columns, levels, scale, out);
  if (bits == 4) return decode<4>(codes, columns, levels, scale, out);
  bits == 2 ? decode<2>(codes, columns, levels, scale, out) : decode<1>(codes, columns, levels, scale, out);
}

}  // namespace

const DecodeRow decode_row_portable = decode_row;

}  // namespace quantize::packed
