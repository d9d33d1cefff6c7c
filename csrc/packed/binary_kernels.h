// Binary layers on the CPU: popcounts of x ^ w, exact, the same on every ISA. Torch-free.
//
// Lanes are pixels: no sums across lanes, and planes of floats come and go as they lie. Blocks of output pixels are gathered (im2col in
// bits), tap-major and dense as the weights' rows are, and multiplied in one of two ways:
//
//   words    An image is planes of 64-bit words, 64 channels each. Pixels share the shifts that join taps, so that any number of channels
//            is the same few vector instructions. x ^ w is counted by carry-save adders or by the machine's own popcount; w is a row of
//            codes, broadcast word by word. What taps outside of the image have counted is subtracted.
//   lookup   An image is planes of nibbles, a byte a pixel, four channels each. The nibble of w chooses a table of 16 popcounts, in which
//            pshufb looks 32 or 64 pixels up: no xor, no splitting, nothing wasted on K's last word. Outside of the image bytes have
//            their top bit set, which pshufb makes 0. For channels in fours, so that a nibble has one tap.
#pragma once

#include <cstdint>

#include "../core/cpu_isa.h"
#include "../weight/lsq.h"

namespace quantize::packed {

struct BinaryTraits {
  static constexpr int block = 128;             // pixels at most
  static constexpr int stride = block + 8;      // of a row of a block: vectors may write behind its end
  static constexpr int channels = 16;           // whose counts lie together before they are finished
  static constexpr int quad = 4;                // bits of a nibble, and channels of a panel
  static constexpr int slack = 64;              // pixels behind an image that vectors may read
  static constexpr int row_bytes_ahead = 4096;  // prefetched in products of one row
};

// Where the bits of an output pixel lie.
struct BinaryWindow {
  int64_t kernel[2], stride[2], dilation[2];
  int64_t channels;      // of a group
  int64_t width, plane;  // of the padded image, in pixels
  int64_t out_width;
};

// What counts become (binary_bits.h's binary_dot): the offset is base[pixel] + shift[channel].
struct BinaryFinish {
  bool unit;
  const int32_t* base;
  const int32_t* shift;
};

struct BinaryKernels {
  // Up to 64 channels of `pixels` floats each, to words[pixel]. threshold: [channels], or null for 0. flip: a bit a channel.
  void (*pack_planes)(const float* x, int64_t pixels, int channels, const float* threshold, uint64_t flip, uint64_t* words);
  // The same of pixels whose channels lie together, a pixel every `step` floats.
  void (*pack_rows)(const float* x, int64_t step, int64_t pixels, int channels, const float* threshold, uint64_t flip, uint64_t* words);
  // Output pixels [first, first + count) to x[word][stride].
  void (*gather)(const uint64_t* image, const BinaryWindow& window, int64_t first, int64_t count, uint64_t* x);
  // counts[channel][stride] of up to 16 channels. codes: rows of 8 * words bytes.
  void (*multiply)(const uint64_t* x, int64_t words, int64_t count, const uint8_t* codes, int channels, int32_t* counts);
  // Less the counts of taps outside of the image, whose x is 0: ones[tap][16], popcount(w), where outside[tap][stride] is -1 and not 0.
  void (*leave_out)(int32_t* counts, int channels, int64_t count, int taps, const int32_t* outside, const int32_t* ones);
  // counts[n] of one row x[words] with each of the rows of codes.
  void (*multiply_row)(const uint64_t* x, int64_t words, const uint8_t* codes, int64_t rows, int32_t* counts);
  // out[c][i] = float(dot) * scale[c] + bias[c], by strides of its own, one of them 1; residual (or null), which lies alike, is added.
  void (*finish_floats)(const int32_t* counts, int channels, int64_t count, BinaryFinish finish, const float* scale, const float* bias,
                        float* out, const float* residual, int64_t channel_stride, int64_t pixel_stride);
  // bits[pixel]: bit c = dot < threshold[c].
  void (*finish_bits)(const int32_t* counts, int channels, int64_t count, BinaryFinish finish, const int32_t* threshold, uint16_t* bits);

  // Lookup: 0 where there is none; else for K of fewer words than this.
  int64_t lookup_words;
  int lookup_block;  // pixels
  // Levels of up to 64 channels of `pixels` floats each, from zero to three: their lower and their higher bits, low[pixel] and high[pixel].
  void (*pack_level_planes)(const float* x, int64_t pixels, int channels, weight::LsqRange range, uint64_t* low, uint64_t* high);
  // The same of pixels whose channels lie together, a pixel every `step` floats.
  void (*pack_level_rows)(const float* x, int64_t step, int64_t pixels, int channels, weight::LsqRange range, uint64_t* low,
                          uint64_t* high);
  // A plane of words to `rows` planes of nibbles, one every `stride` bytes. Writes 32 pixels at a time.
  void (*index)(const uint64_t* words, int64_t pixels, int rows, uint8_t* nibbles, int64_t stride);
  // Output pixels [first, first + count) to index[nibble][stride]. Writes up to 31 bytes behind a row's end.
  void (*gather_index)(const uint8_t* image, const BinaryWindow& window, int64_t first, int64_t count, uint8_t* index, int64_t stride);
  // counts of `panels` panels, 4 channels each: nibbles [quads][4], shifted up by 4.
  void (*lookup)(const uint8_t* index, int64_t stride, int64_t quads, int64_t count, const uint8_t* nibbles, int panels, int32_t* counts);
};

extern const BinaryKernels binary_portable, binary_avx2, binary_avx512, binary_avx512vpopcntdq;

inline const BinaryKernels& binary_kernels() {
#ifdef QUANTIZE_X86
  if (cpu_isa() >= Isa::avx512) return cpu_has_vpopcntdq() ? binary_avx512vpopcntdq : binary_avx512;
  if (cpu_isa() == Isa::avx2) return binary_avx2;
#endif
  return binary_portable;
}

}  // namespace quantize::packed
