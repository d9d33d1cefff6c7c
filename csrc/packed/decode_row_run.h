// What all ISAs' decode_row have in common, included by one file per ISA.
#pragma once

#include "decode_kernels.h"

namespace quantize::packed {
namespace {  // every ISA's object has its own copy, compiled for its own instructions

// `count` codes one by one: those that fill no vector.
template <int bits>
inline void decode_rest(const uint8_t* codes, int64_t count, const float* levels, float scale, float* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = scale * levels[(codes[k * bits / 8] >> (k * bits % 8)) & ((1 << bits) - 1)];
}

// decode.operator()<bits>().
template <typename Decode>
inline void for_bits(int bits, const Decode& decode) {
  if (bits == 8) return decode.template operator()<8>();
  if (bits == 4) return decode.template operator()<4>();
  bits == 2 ? decode.template operator()<2>() : decode.template operator()<1>();
}

}  // namespace
}  // namespace quantize::packed
