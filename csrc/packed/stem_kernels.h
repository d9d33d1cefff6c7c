// The first convolution of a network in floats: a large kernel in steps of two over an image of few channels. Minimal filtering along the
// lines, F(4, 4) (Winograd; Lavin and Gray, arXiv 1509.09308): even and odd pixels are two channels in steps of one, of at most four taps
// each; four outputs then take seven products a channel and line where 5 to 8 taps take 20 to 32. Rounded two to three times as much as
// plain sums are, about 5e-7 of the outputs' deviation. Torch-free.
//
// The transform's points are 0, 1, -1, 2, -2, 1/2 and infinity, so that its factors are powers of two, and 5: quantize/packed/stems.py has
// the weights' side of it. Lanes are output channels, and tiles where pixels are transformed.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"

namespace quantize::packed {

struct StemTraits {
  static constexpr int points = 7, tile = 4, step = 2;  // step: of pixels, so that a tile begins every eight
  static constexpr int fewest_taps = 5, most_taps = 8;  // along a line
  static constexpr int most_lines = 16;                 // of a kernel
  static constexpr int columns = 16;                    // output channels of a panel
  static constexpr int most_channels = 4;               // of the image: the transform of more would no longer be for nothing
};

// What lines of transformed pixels have in common: [point][depth][pitch]. depth: even pixels' channels, then odd ones'.
struct StemLines {
  int64_t count;        // of the kernel
  int64_t depth, last;  // last: at infinity, where the weights of less than four taps are zero
  int64_t tiles, pitch;

  StemLines(int64_t kernel_height, int64_t kernel_width, int64_t channels, int64_t out_width)
      : count(kernel_height),
        depth(2 * channels),
        last((kernel_width > 6) * channels + (kernel_width > 7) * channels),
        tiles((out_width + StemTraits::tile - 1) / StemTraits::tile),
        pitch((tiles + 15) / 16 * 16) {}
  int64_t floats() const { return StemTraits::points * depth * pitch; }                 // of a transformed line
  int64_t pixels() const { return StemTraits::tile * StemTraits::step * (tiles + 1); }  // of a padded one
  int64_t steps() const { return count * ((StemTraits::points - 1) * depth + last); }   // of an output's products
};

struct StemKernels {
  // A channel's padded line of `pixels`: its even pixels to v, its odd ones `odd` floats further. apart: 8 * (pitch + 16) floats.
  void (*transform)(const float* line, const StemLines& lines, int64_t odd, float* apart, float* v);
  // A line of outputs [4 * tiles][16 * panels], bias added. v: lines.count lines. weights: [panels][steps][16], point by point and
  // line by line. bias: [panels][16]. sums: most_sums floats.
  void (*multiply)(const float* const* v, const StemLines& lines, const float* weights, const float* bias, int64_t panels, float* sums,
                   float* out);
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
