// The image kernels of binary_kernels.h: floats to bits, bits to blocks, counts to outputs. Included by one file per ISA.
#pragma once

#include "../core/lane_mask.h"
#include "binary_bits.h"
#include "binary_words_run.h"

namespace quantize::packed {
namespace {

// Several registers of pixels at a time: neighbours in each channel's plane, while its next channel is far away.
template <int parts>
QUANTIZE_INLINE void pack_part(const float* x, int64_t plane, int channels, const float* threshold, uint64_t flip, uint64_t* words) {
  constexpr int pixels = parts * Lanes::width;
  uint32_t halves[2][pixels];
  for (int half = 0; half < 2; ++half) {
    Lanes::Whole bits[parts] = {};
    const int first = 32 * half, many = channels - first < 32 ? channels - first : 32;
    for (int c = 0; c < many; ++c) {
      const float limit = threshold ? threshold[first + c] : 0.f, *source = x + (first + c) * plane;
#pragma GCC unroll 8
      for (int i = 0; i < parts; ++i) {
        Lanes::Part v;
        std::memcpy(&v, source + i * Lanes::width, sizeof v);
#ifdef __AVX512F__
        const __mmask16 below = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_LT_OQ);
        bits[i] = (Lanes::Whole)_mm512_mask_or_epi32((__m512i)bits[i], below, (__m512i)bits[i], _mm512_set1_epi32(1 << c));
#else
        bits[i] |= (v < limit - Lanes::Part{}) & (1 << c);
#endif
      }
    }
    std::memcpy(halves[half], bits, sizeof bits);
  }
  for (int l = 0; l < pixels; ++l) words[l] = (halves[0][l] | uint64_t(halves[1][l]) << 32) ^ flip;
}

// A last part that would end behind the plane starts earlier.
template <int parts>
void pack_parts(const float* x, int64_t pixels, int channels, const float* threshold, uint64_t flip, uint64_t* words) {
  constexpr int64_t some = parts * Lanes::width;
  for (int64_t p = 0; p < pixels; p += some) {
    const int64_t at = p + some <= pixels ? p : pixels - some;
    pack_part<parts>(x + at, pixels, channels, threshold, flip, words + at);
  }
}

void pack_planes(const float* x, int64_t pixels, int channels, const float* threshold, uint64_t flip, uint64_t* words) {
  if (pixels >= 8 * Lanes::width) return pack_parts<8>(x, pixels, channels, threshold, flip, words);
  if (pixels >= 3 * Lanes::width) return pack_parts<3>(x, pixels, channels, threshold, flip, words);
  if (pixels >= Lanes::width) return pack_parts<1>(x, pixels, channels, threshold, flip, words);
  for (int64_t p = 0; p < pixels; ++p) {
    uint64_t word = flip;
    for (int c = 0; c < channels; ++c) word ^= uint64_t(binary_bit(x[c * pixels + p], threshold ? threshold[c] : 0.f, false)) << c;
    words[p] = word;
  }
}

void pack_rows(const float* x, int64_t step, int64_t pixels, int channels, const float* threshold, uint64_t flip, uint64_t* words) {
  for (int64_t p = 0; p < pixels; ++p, x += step) {
    uint64_t word = 0;
    for (int c = 0; c < channels; c += lanes) {
      const int count = channels - c;
      const Lanes limit = threshold ? load_part(threshold + c, count) : Lanes(0.f);
      const uint64_t bits = bits_of(below(load_part(x + c, count), limit));
      word |= (count < lanes ? bits & ((1u << count) - 1) : bits) << c;
    }
    words[p] = word ^ flip;
  }
}

// One word of a tap: target = source, or target |= part of it. Writes whole vectors, behind `count` too: what stands there is written
// later, by the next line's first word at this place. A step of one is a copy.
enum class Put { all, low, high };
template <Put put>
QUANTIZE_INLINE void put_line(const uint64_t* source, int64_t step, int64_t count, uint64_t trim, int shift, uint64_t* target) {
  for (int64_t i = 0; i < count; i += word_lanes) {
    Words v;
    if (step == 1)
      v = load_words(source + i);
    else
      for (int l = 0; l < word_lanes; ++l) v[l] = i + l < count ? source[(i + l) * step] : 0;
    if (put == Put::low) v = load_words(target + i) | (v & trim) << shift;
    if (put == Put::high) v = (v & trim) >> shift;
    std::memcpy(target + i, &v, sizeof v);
  }
}

void gather(const uint64_t* image, const BinaryWindow& window, int64_t first, int64_t count, uint64_t* x) {
  constexpr int64_t row = BinaryTraits::stride;
  for (int64_t done = 0; done < count;) {  // line by line of the output, so that what a line writes too much the next one mends
    const int64_t y = (first + done) / window.out_width, column = (first + done) % window.out_width;
    const int64_t line = count - done < window.out_width - column ? count - done : window.out_width - column, step = window.stride[1];
    int64_t bit = 0;
    for (int64_t i = 0; i < window.kernel[0]; ++i)
      for (int64_t j = 0; j < window.kernel[1]; ++j) {
        const uint64_t* source =
            image + (y * window.stride[0] + i * window.dilation[0]) * window.width + column * step + j * window.dilation[1];
        for (int64_t c = 0; c < window.channels; c += 64, source += window.plane) {
          const int64_t left = window.channels - c;
          const int bits = left < 64 ? int(left) : 64, shift = int(bit % 64);
          const uint64_t trim = bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
          uint64_t* target = x + bit / 64 * row + done;
          if (shift == 0)
            bits == 64 ? put_line<Put::all>(source, step, line, trim, 0, target) : put_line<Put::high>(source, step, line, trim, 0, target);
          else {
            put_line<Put::low>(source, step, line, trim, shift, target);
            if (shift + bits > 64) put_line<Put::high>(source, step, line, trim, 64 - shift, target + row);
          }
          bit += bits;
        }
      }
    done += line;
  }
}

void leave_out(int32_t* counts, int channels, int64_t count, int taps, const int32_t* outside, const int32_t* ones) {
  constexpr int64_t row = BinaryTraits::stride;
  for (int c = 0; c < channels; ++c)
    for (int64_t i = 0; i < count; i += Lanes::width) {
      Lanes::Whole sum, taken;
      std::memcpy(&sum, counts + c * row + i, sizeof sum);
      for (int t = 0; t < taps; ++t) {
        std::memcpy(&taken, outside + t * row + i, sizeof taken);
        sum -= taken & ones[t * BinaryTraits::channels + c];
      }
      std::memcpy(counts + c * row + i, &sum, sizeof sum);
    }
}

template <bool unit>
QUANTIZE_INLINE void values_of(const int32_t* __restrict counts, int64_t count, const int32_t* __restrict base, int32_t shift, float scale,
                               float bias, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = binary_value(binary_dot(unit, counts[i], base[i] + shift), scale, bias);
}

// Four pixels of four channels, turned.
QUANTIZE_INLINE void store_turned(const float* values, int64_t step, float* out, const float* residual, int64_t pixel_stride) {
  using Four = float __attribute__((vector_size(16)));
  using Places = int32_t __attribute__((vector_size(16)));
  Four a, b, c, d;
  std::memcpy(&a, values, 16), std::memcpy(&b, values + step, 16);
  std::memcpy(&c, values + 2 * step, 16), std::memcpy(&d, values + 3 * step, 16);
  const Four ab = __builtin_shuffle(a, b, Places{0, 4, 1, 5}), cd = __builtin_shuffle(c, d, Places{0, 4, 1, 5});
  const Four ab2 = __builtin_shuffle(a, b, Places{2, 6, 3, 7}), cd2 = __builtin_shuffle(c, d, Places{2, 6, 3, 7});
  Four rows[4] = {__builtin_shuffle(ab, cd, Places{0, 1, 4, 5}), __builtin_shuffle(ab, cd, Places{2, 3, 6, 7}),
                  __builtin_shuffle(ab2, cd2, Places{0, 1, 4, 5}), __builtin_shuffle(ab2, cd2, Places{2, 3, 6, 7})};
  for (int i = 0; i < 4; ++i) {
    if (residual) {
      Four more;
      std::memcpy(&more, residual + i * pixel_stride, 16);
      rows[i] += more;
    }
    std::memcpy(out + i * pixel_stride, &rows[i], 16);
  }
}

void finish_floats(const int32_t* counts, int channels, int64_t count, BinaryFinish finish, const float* scale, const float* bias,
                   float* out, const float* residual, int64_t channel_stride, int64_t pixel_stride) {
  constexpr int64_t row = BinaryTraits::stride;
  float values[4 * row];
  for (int c = 0; c < channels; c += 4) {
    const int many = channels - c < 4 ? channels - c : 4;
    for (int j = c; j < c + many; ++j) {
      float* target = pixel_stride == 1 ? out + j * channel_stride : values + (j - c) * row;
      const auto run = finish.unit ? values_of<true> : values_of<false>;
      run(counts + j * row, count, finish.base, finish.shift[j], scale[j], bias[j], target);
      if (residual && pixel_stride == 1)
        for (int64_t i = 0; i < count; ++i) target[i] += residual[j * channel_stride + i];
    }
    if (pixel_stride == 1) continue;
    int64_t i = 0;
    if (many == 4 && channel_stride == 1)
      for (; i + 4 <= count; i += 4)
        store_turned(values + i, row, out + i * pixel_stride + c, residual ? residual + i * pixel_stride + c : nullptr, pixel_stride);
    for (; i < count; ++i)
      for (int j = 0; j < many; ++j) {
        const int64_t at = i * pixel_stride + (c + j) * channel_stride;
        const float value = values[j * row + i];
        out[at] = residual ? value + residual[at] : value;
      }
  }
}

template <bool unit>
QUANTIZE_INLINE void bits_below(const int32_t* __restrict counts, int64_t count, const int32_t* __restrict base, int32_t shift,
                                int32_t threshold, int32_t bit, int32_t* __restrict bits) {
  for (int64_t i = 0; i < count; ++i) bits[i] |= binary_next_bit(binary_dot(unit, counts[i], base[i] + shift), threshold, false) ? bit : 0;
}

void finish_bits(const int32_t* counts, int channels, int64_t count, BinaryFinish finish, const int32_t* threshold, uint16_t* bits) {
  int32_t collected[BinaryTraits::block] = {};
  for (int c = 0; c < channels; ++c) {
    const auto run = finish.unit ? bits_below<true> : bits_below<false>;
    run(counts + c * BinaryTraits::stride, count, finish.base, finish.shift[c], threshold[c], 1 << c, collected);
  }
  for (int64_t i = 0; i < count; ++i) bits[i] = uint16_t(collected[i]);
}

}  // namespace
}  // namespace quantize::packed
