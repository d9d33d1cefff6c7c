// Products in AMX's tiles: 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
#include <immintrin.h>

#include "tile_kernels.h"

namespace quantize::packed {
namespace {

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr Configuration() {
    for (int tile = 0; tile < 8; ++tile) bytes[tile] = TileTraits::bytes, rows[tile] = TileTraits::rows;
  }
};

// Not on the stack: GCC's intrinsic says that it reads eight bytes, and stores to the others are dropped.
constexpr Configuration whole;

void begin() { _tile_loadconfig(&whole); }

void end() { _tile_release(); }

// The intrinsics take numbers, not variables.
#define QUANTIZE_PRODUCT(sum, rows, weights) \
  if constexpr (negative) {                  \
    _tile_dpbssd(sum, rows, weights);        \
  } else {                                   \
    _tile_dpbusd(sum, rows, weights);        \
  }

template <int row_tiles, int panels, bool negative>
void run(const uint8_t* x, int64_t stride, TileLines lines, const int8_t* levels, int32_t* acc) {
  constexpr int64_t tile_bytes = TileTraits::quads * TileTraits::bytes;
  const int64_t panel_bytes = lines.count * lines.chunks * tile_bytes;
  _tile_zero(0);
  if constexpr (panels == 2) _tile_zero(1);
  if constexpr (row_tiles == 2) _tile_zero(2);
  if constexpr (row_tiles == 2 && panels == 2) _tile_zero(3);
  for (int64_t l = 0; l < lines.count; ++l) {
    const uint8_t* row = x + lines.offsets[l];
    for (int64_t k = 0; k < lines.chunks; ++k, row += TileTraits::bytes, levels += tile_bytes) {
      _tile_loadd(4, row, stride);
      _tile_loadd(6, levels, TileTraits::bytes);
      QUANTIZE_PRODUCT(0, 4, 6);
      if constexpr (panels == 2) {
        _tile_loadd(7, levels + panel_bytes, TileTraits::bytes);
        QUANTIZE_PRODUCT(1, 4, 7);
      }
      if constexpr (row_tiles == 2) {
        _tile_loadd(5, row + TileTraits::rows * stride, stride);
        QUANTIZE_PRODUCT(2, 5, 6);
      }
      if constexpr (row_tiles == 2 && panels == 2) {
        QUANTIZE_PRODUCT(3, 5, 7);
      }
    }
  }
  constexpr int64_t pitch = panels * TileTraits::columns * 4;
  _tile_stored(0, acc, pitch);
  if constexpr (panels == 2) _tile_stored(1, acc + TileTraits::columns, pitch);
  int32_t* below = acc + TileTraits::rows * panels * TileTraits::columns;
  if constexpr (row_tiles == 2) _tile_stored(2, below, pitch);
  if constexpr (row_tiles == 2 && panels == 2) _tile_stored(3, below + TileTraits::columns, pitch);
}

#undef QUANTIZE_PRODUCT

template <bool negative>
void multiply(const uint8_t* x, int64_t stride, int row_tiles, TileLines lines, const int8_t* levels, int panels, int32_t* acc) {
  const auto chosen = row_tiles == 2 ? (panels == 2 ? run<2, 2, negative> : run<2, 1, negative>)
                                     : (panels == 2 ? run<1, 2, negative> : run<1, 1, negative>);
  chosen(x, stride, lines, levels, acc);
}

void spread(const uint64_t* words, int64_t pixels, int channels, bool unit, uint8_t* image, int64_t pixel_bytes) {
  const __m512i zero = _mm512_set1_epi8(unit ? 0 : 1), one = _mm512_set1_epi8(unit ? 1 : -1);
  const __mmask64 there = channels < 64 ? (__mmask64(1) << channels) - 1 : ~__mmask64(0);
  for (int64_t p = 0; p < pixels; ++p) _mm512_mask_storeu_epi8(image + p * pixel_bytes, there, _mm512_mask_blend_epi8(words[p], zero, one));
}

// A lane holds four quads of a panel: 16 nibbles. A quad's four are spread over the lane, and each byte tests a bit of its own.
void sign_levels(const uint8_t* nibbles, int64_t quads, int panels, int64_t panel_bytes, int8_t* levels) {
  const __m512i plus = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1), bit = _mm512_set1_epi32(int(0x80402010));
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
  const auto some = [&](int64_t q, int count) __attribute__((always_inline)) {
    const auto lane = [&](int panel) __attribute__((always_inline)) {
      if (panel >= panels) return _mm_setzero_si128();
      const uint8_t* from = nibbles + panel * panel_bytes + q * 4;
      return count == 4 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)) : _mm_maskz_loadu_epi32(__mmask8((1 << count) - 1), from);
    };
    __m512i four = _mm512_castsi128_si512(lane(0));
    four = _mm512_inserti32x4(four, lane(1), 1);
    four = _mm512_inserti32x4(four, lane(2), 2);
    four = _mm512_inserti32x4(four, lane(3), 3);
    __m512i place = first;
    for (int j = 0; j < count; ++j, place = _mm512_add_epi8(place, _mm512_set1_epi8(4)))
      _mm512_storeu_si512(levels + (q + j) * TileTraits::bytes,
                          _mm512_mask_blend_epi8(_mm512_test_epi8_mask(_mm512_shuffle_epi8(four, place), bit), plus, minus));
  };
  int64_t q = 0;
  for (; q + 4 <= quads; q += 4) some(q, 4);
  if (q < quads) some(q, int(quads - q));
}

void compare(const int32_t* acc, int64_t pitch, int64_t rows, int channels, const int32_t* threshold, uint16_t* bits) {
  const __mmask16 there = __mmask16((1 << channels) - 1);
  const __m512i limit = _mm512_maskz_loadu_epi32(there, threshold);
  for (int64_t i = 0; i < rows; ++i)
    bits[i] = uint16_t(_mm512_mask_cmplt_epi32_mask(there, _mm512_maskz_loadu_epi32(there, acc + i * pitch), limit));
}

}  // namespace

const TileKernels tile_amx{begin, end, multiply<false>, multiply<true>, spread, sign_levels, compare};

}  // namespace quantize::packed
