// The first convolution of a network in floats: a large kernel in steps of two over an image of few channels. Minimal filtering F(4x4, 4x4)
// (Winograd; Lavin and Gray, arXiv 1509.09308): even and odd pixels, along lines and across them, are channels of their own in steps of
// one, of at most 4 x 4 taps each; sixteen outputs of a 7 x 7 kernel then take 169 products a channel where sums take 784. Rounded five to
// six times as much as plain sums are, about 1.2e-6 of the outputs' deviation. Torch-free.
//
// The transform's points are 0, 1, -1, 2, -2, 1/2 and infinity, so that its factors are powers of two, and 5: quantize/packed/stems.py has
// the weights' side of it. Lanes are output channels, and tiles where pixels are transformed.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

struct StemTraits {
  static constexpr int points = 7, tile = 4, step = 2;  // of each dimension; step: of pixels, so that a tile begins every eight
  static constexpr int lines = 14;                      // of the image, that a tile sees
  static constexpr int fewest_taps = 5, most_taps = 8;
  static constexpr int columns = 16;       // output channels of a panel
  static constexpr int most_channels = 4;  // of the image: the transform of more would no longer be for nothing
};

// Transformed pixels of a line: [point][depth][pitch]. depth: even pixels' channels, then odd ones'. Of a line of tiles: [point][even
// lines, odd lines] of those.
struct StemSizes {
  int64_t depth, last;  // last: at infinity, where the weights of less than four taps are zero
  int64_t last_lines;   // even and odd ones, at infinity
  int64_t tiles, pitch;

  StemSizes(int64_t kernel_height, int64_t kernel_width, int64_t channels, int64_t out_width)
      : depth(2 * channels),
        last(at_infinity(kernel_width) * channels),
        last_lines(at_infinity(kernel_height)),
        tiles((out_width + StemTraits::tile - 1) / StemTraits::tile),
        pitch((tiles + 15) / 16 * 16) {}
  static int64_t at_infinity(int64_t taps) { return (taps > 6) + (taps > 7); }
  int64_t line() const { return StemTraits::points * depth * pitch; }                   // floats
  int64_t pixels() const { return StemTraits::tile * StemTraits::step * (tiles + 1); }  // of a padded line
  int64_t lines(int point) const { return point < StemTraits::points - 1 ? 2 : last_lines; }
  int64_t line_steps() const { return (StemTraits::points - 1) * depth + last; }
  int64_t steps() const { return ((StemTraits::points - 1) * 2 + last_lines) * line_steps(); }  // of an output's products
};

// What becomes of a sum.
struct StemFinish {
  const float* bias;  // [panels][16]
  float low, high;
};

struct StemKernels {
  // A channel's padded line of `pixels`: its even pixels to v, its odd ones `odd` floats further. apart: 8 * (pitch + 16) floats.
  void (*transform)(const float* line, const StemSizes& sizes, int64_t odd, float* apart, float* v);
  // Fourteen transformed lines to a line of tiles.
  void (*transform_lines)(const float* const* lines, const StemSizes& sizes, float* v);
  // Four lines of outputs [4 * tiles][16 * panels], `pitch` floats apart. v: a line of tiles. weights: [panels][steps][16], point by point,
  // of lines before those of pixels. sums: most_sums floats.
  void (*multiply)(const float* v, const StemSizes& sizes, const float* weights, int64_t panels, const StemFinish& finish, float* sums,
                   float* out, int64_t pitch);
  int64_t most_sums;
  // Pixels [pixels][pitch] to planes: out[c * plane + pixel] of `channels`.
  void (*turn)(const float* row, int64_t pixels, int64_t pitch, int64_t channels, float* out, int64_t plane);
};

extern const StemKernels stem_avx2, stem_avx512;

// Null where there is no multiply-add of vectors.
inline const StemKernels* stem_kernels() {
#ifdef QUANTIZE_X86
  if (cpu_isa() >= Isa::avx512) return &stem_avx512;
  if (cpu_isa() == Isa::avx2) return &stem_avx2;
#endif
  return nullptr;
}

}  // namespace quantize::packed
