// A row of codes to floats, for any processor.
#include "decode_row_run.h"

namespace quantize::packed {
namespace {

template <int bits>
void decode(const uint8_t* codes, int64_t columns, const float* levels, float scale, float* out) {
  constexpr int share = 8 / bits, mask = (1 << bits) - 1;
  int64_t k = 0;
  for (; k + share <= columns; k += share, ++codes)
    for (int s = 0; s < share; ++s) out[k + s] = scale * levels[(*codes >> (s * bits)) & mask];
  decode_rest<bits>(codes, columns - k, levels, scale, out + k);
}

void decode_row(const uint8_t* codes, int bits, int64_t columns, const float* levels, float scale, float* out) {
  for_bits(bits, [&]<int b>() { decode<b>(codes, columns, levels, scale, out); });
}

}  // namespace

const DecodeRow decode_row_portable = decode_row;

}  // namespace quantize::packed
