// Integer products in tiles (AMX): 16 rows by 64 bytes, times 64 bytes by 16 columns. Exact int32 results, those of gemm_kernels.h.
// Torch-free.
//
// A weight's panel is that of gemm_kernels.h in int8: 16 quads of it are a tile. Rows of an image are read where they lie.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

struct TileTraits {
  static constexpr int rows = 16, columns = 16, bytes = 64, quads = 16;
  static constexpr int together = 2;  // tiles of rows, and panels: four tiles of sums, two and two of what is multiplied
};

// Where the bytes lie that a row's products take: `chunks` times 64 behind each of the offsets.
struct TileLines {
  const int32_t* offsets;
  int64_t count, chunks;
};

struct TileKernels {
  // Before and after products, on each thread: tiles are set up and given back. TileSession calls them.
  void (*begin)();
  void (*end)();
  // acc[16 * row_tiles][16 * panels]: row i lies at x + i * stride, levels are [panels][lines][chunks][16 quads][16][4]. row_tiles, panels:
  // 1 or 2. Rows are unsigned bytes, or signed ones.
  void (*multiply)(const uint8_t* x, int64_t stride, int row_tiles, TileLines lines, const int8_t* levels, int panels, int32_t* acc);
  void (*multiply_signed)(const uint8_t* x, int64_t stride, int row_tiles, TileLines lines, const int8_t* levels, int panels, int32_t* acc);

  // For binary layers. A pixel's up to 64 bits to bytes, a pixel every pixel_bytes: 1 and -1, or (`unit`) 0 and 1.
  void (*spread)(const uint64_t* words, int64_t pixels, int channels, bool unit, uint8_t* image, int64_t pixel_bytes);
  // 1 to 4 panels of binary_kernels.h, a panel every panel_bytes, to one of quads of 1 and -1.
  void (*sign_levels)(const uint8_t* nibbles, int64_t quads, int panels, int64_t panel_bytes, int8_t* levels);
  // bits[i]: bit c = acc[i][c] < threshold[c], of up to 16 channels; acc's rows hold `pitch` sums.
  void (*compare)(const int32_t* acc, int64_t pitch, int64_t rows, int channels, const int32_t* threshold, uint16_t* bits);
};

extern const TileKernels tile_amx;

// Null where there are no tiles.
inline const TileKernels* tile_kernels() {
#ifdef QUANTIZE_X86
  if (cpu_isa() >= Isa::amx) return &tile_amx;
#endif
  return nullptr;
}

// Tiles for a thread's products: given back also when something throws, since the thread goes on to other work. None where kernels are
// null.
class TileSession {
 public:
  explicit TileSession(const TileKernels* kernels) : kernels_(kernels) {
    if (kernels_) kernels_->begin();
  }
  ~TileSession() {
    if (kernels_) kernels_->end();
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  const TileKernels* kernels_;
};

}  // namespace quantize::packed
