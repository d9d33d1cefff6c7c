// A few rows of floats by codes of 2, 4 or 8 bits, which are decoded in registers: memory gives no more than the codes.
#pragma once

#include <algorithm>

#include "word_decoder.cuh"

namespace quantize::packed {

struct FloatRows {
  static constexpr int threads = 256, most_rows = 8, channels_of_warp = 4;
};

// x: [rows, columns]. codes: [out_channels, vectors of V]. levels: [2^bits]. bias: null for 0.
struct FloatRowsCall {
  const float* x;
  int rows, columns, out_channels, vectors;
  const uint8_t* codes;
  const float *levels, *scales, *bias;
  float* out;  // [rows, out_channels]
};

// Four of a row from k on; zeros from `columns` on. whole: they are there or not, all four.
QUANTIZE_DEVICE void load_floats(const float* row, int64_t k, int columns, bool whole, float (&out)[4]) {
  if (whole && k < columns) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = bits_float(vector_word(bits, i));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = k + i < columns ? row[k + i] : 0.f;
}

// A block has 32 output channels, 4 a warp. V: what a lane reads of the codes at once, uint4 or uint64_t. c.rows <= R. whole: floats are
// read in fours.
template <int R, int bits, typename V>
__global__ void __launch_bounds__(FloatRows::threads) float_rows(FloatRowsCall c, bool whole) {
  using Decoder = WordDecoder<bits>;
  constexpr int some = FloatRows::channels_of_warp, fours = int(sizeof(V)) / 4 * Decoder::words;
  __shared__ float dots[R][32];
  const int lane = threadIdx.x % Warp::lanes, warp = threadIdx.x / Warp::lanes, first = blockIdx.x * 32 + warp * some;
  const V* codes = reinterpret_cast<const V*>(c.codes);
  const Decoder decoder(c.levels);
  float sums[R][some] = {};
  for (int v = lane; v < c.vectors; v += Warp::lanes) {
    V own[some];
#pragma unroll
    for (int j = 0; j < some; ++j) own[j] = codes[int64_t(std::min(first + j, c.out_channels - 1)) * c.vectors + v];
    static_for<fours>([&]<int part>() {
      float weights[some][4];
#pragma unroll
      for (int j = 0; j < some; ++j) {
        const uint32_t levels = decoder.template four<part % Decoder::words>(word_at(own[j], part / Decoder::words));
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[j][i] = float(int8_t(levels >> (8 * i)));
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        float x[4];
        load_floats(c.x + int64_t(std::min(r, c.rows - 1)) * c.columns, (int64_t(v) * fours + part) * 4, c.columns, whole, x);
#pragma unroll
        for (int j = 0; j < some; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[r][j] = __fmaf_rn(x[i], weights[j][i], sums[r][j]);
      }
    });
  }
  share_sums(sums, dots);
  const int n = blockIdx.x * 32 + lane;
  if (warp >= c.rows || n >= c.out_channels) return;
  c.out[int64_t(warp) * c.out_channels + n] = dots[warp][lane] * c.scales[n] + (c.bias ? c.bias[n] : 0.f);
}

template <int bits, typename V, typename Launcher>
void launch_float_rows_of(FloatRowsCall c, int64_t code_bytes, Launcher& launch) {
  c.vectors = int(code_bytes / sizeof(V));
  const auto kernel = c.rows == 1   ? float_rows<1, bits, V>
                      : c.rows == 2 ? float_rows<2, bits, V>
                      : c.rows <= 4 ? float_rows<4, bits, V>
                                    : float_rows<8, bits, V>;
  launch(kernel, dim3(unsigned((c.out_channels + 31) / 32)), FloatRows::threads, c, c.columns % 4 == 0 && is_aligned(c.x, 16));
}

// code_bytes: of a row. Codes lie at multiples of 8 bytes. At most FloatRows::most_rows; no size is 0.
template <typename Launcher>
void launch_float_rows(const FloatRowsCall& c, int bits, int64_t code_bytes, Launcher& launch) {
  const bool wide = code_bytes % 16 == 0 && is_aligned(c.codes, 16);
  switch (bits) {
    case 2:
      return wide ? launch_float_rows_of<2, uint4>(c, code_bytes, launch) : launch_float_rows_of<2, uint64_t>(c, code_bytes, launch);
    case 4:
      return wide ? launch_float_rows_of<4, uint4>(c, code_bytes, launch) : launch_float_rows_of<4, uint64_t>(c, code_bytes, launch);
    default:
      return wide ? launch_float_rows_of<8, uint4>(c, code_bytes, launch) : launch_float_rows_of<8, uint64_t>(c, code_bytes, launch);
  }
}

}  // namespace quantize::packed
