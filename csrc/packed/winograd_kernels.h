// 3x3 convolutions of bytes by minimal filtering, F(2x2, 3x3) (Winograd; Lavin and Gray, arXiv 1509.09308), in whole numbers: a tile of
// four outputs takes 16 products a channel and not 36. Exact: the weights' transform is taken twice in each dimension, and sums are four
// times what they should be. Torch-free.
//
// Pixels Y = A'((GgG') * (B'dB))A, with rows of B' (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1), of 2G (2, 0, 0), (1, 1, 1),
// (1, -1, 1), (0, 0, 2), of A' (1, 1, 1, 0), (0, 1, -1, -1). |B'dB| <= 1020 and |4GgG'| <= 9 * 127 fit 16 bits.
//
// For processors that multiply pairs of 16 bits as fast as large bytes: AVX2.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

struct WinogradTraits {
  static constexpr int columns = 16;  // output channels of a panel
  static constexpr int lanes = 16;    // input channels are filled up to a multiple of these
  static constexpr int block = 24;    // tiles that are multiplied together: their sums stay in the first cache
  static constexpr int64_t most_channels = (int64_t(1) << 31) / (4 * 9 * 255 * 127);  // whose sums fit 32 bits
};

struct WinogradKernels {
  // B'dB of `count` tiles: v[position][tile][channels], positions every `v_plane`. Tile i is at image + tiles[i]: 4 pixels of 4 lines.
  void (*transform_pixels)(const uint8_t* image, const int32_t* tiles, int64_t count, int64_t line, int64_t pixel, int64_t channels,
                           int16_t* v, int64_t v_plane);
  // 4GgG' of a decoded panel (gemm_kernels.h) of 9 taps: u[position][channel / 2][column][channel % 2].
  void (*transform_weights)(const int8_t* levels, int64_t quads, int64_t channels, int16_t* u);
  // The outputs of up to `block` tiles: sums[line][2 * tile + pixel][column], `pitch` sums from line to line.
  void (*multiply)(const int16_t* v, int64_t v_plane, int64_t count, int64_t channels, const int16_t* u, int32_t* sums, int64_t pitch);
};

extern const WinogradKernels winograd_avx2;

// Null where products of bytes are faster.
inline const WinogradKernels* winograd_kernels() {
#ifdef QUANTIZE_X86
  if (cpu_isa() != Isa::portable && !cpu_has_vnni()) return &winograd_avx2;
#endif
  return nullptr;
}

}  // namespace quantize::packed
