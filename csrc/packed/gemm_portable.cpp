// Integer products of packed weights, for any processor.
#include "gemm_run.h"

namespace quantize::packed {
namespace {

void multiply(const uint8_t* x, const int32_t* rows, int count, const int32_t* taps, int tap_count, int64_t quads, const int8_t* levels,
              int64_t panel_bytes, int tiles, int, int32_t* acc) {
  for (int i = 0; i < count; ++i)
    for (int tile = 0; tile < tiles; ++tile) {
      int32_t sum[GemmTraits::columns] = {};
      const int8_t* w = levels + tile * panel_bytes;
      for (int t = 0; t < tap_count; ++t) {
        const uint8_t* row = x + rows[i] + taps[t];
        for (int64_t q = 0; q < quads; ++q, w += GemmTraits::quad_bytes)
          for (int c = 0; c < GemmTraits::columns; ++c)
            for (int j = 0; j < GemmTraits::quad; ++j) sum[c] += int32_t(row[4 * q + j]) * w[4 * c + j];
      }
      std::memcpy(acc + (i * tiles + tile) * GemmTraits::columns, sum, sizeof sum);
    }
}

void multiply_row(const uint8_t* x, const Weights& first, int tiles, int32_t* acc) {
  Weights w = first;
  for (int p = 0; p < tiles; ++p, w.codes += w.bytes(), acc += GemmTraits::columns) {
    int32_t sum[GemmTraits::columns] = {};
    for (int64_t q = 0; q < w.quads; ++q)
      for (int c = 0; c < GemmTraits::columns; ++c)
        for (int j = 0; j < GemmTraits::quad; ++j) sum[c] += int32_t(x[4 * q + j]) * level_at(w, q, 4 * c + j);
    std::memcpy(acc, sum, sizeof sum);
  }
}

void multiply_row_float(const float* x, const Weights& w, float* acc) {
  float_row(x, w, acc, [&](const uint8_t* codes, int8_t* levels) {
    Weights some = w;
    some.codes = codes, some.quads = 8 / w.bits;
    decode_plain(some, levels);
  });
}

}  // namespace

const GemmKernels gemm_portable{decode_plain, multiply, multiply_row, multiply_row_float};

}  // namespace quantize::packed
