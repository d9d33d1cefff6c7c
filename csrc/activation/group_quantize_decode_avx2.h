// Unpacking with AVX2, for both vector ISAs: two AVX-512 columns are 128 elements apart, and storing them in halves is slower than this.
#pragma once

#include <immintrin.h>

#include "group_quantize_scalar.h"

namespace quantize::activation {
namespace {

struct DecodeAvx2 {
  using I = __m256i;
  using F = __m256;

  template <typename T, int bits>
  static void decode(const uint8_t* codes, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, T* y) {
    if (is_poisoned(range)) return scalar_decode<T, bits>(codes, begin, end, n, group, range, seed, y);
    constexpr int block = block_elements(bits);
    const Levels<T, bits> levels(range);
    Dither dither(T::scalar == Scalar::f32 ? 0 : dither_key(group, seed), begin);
    int64_t e = begin;
    for (; e + block <= end; e += block) decode_block<T, bits>(codes + e * bits / 8, levels, dither, y + e);
    // The end of the group, which is in order: what ends before consists of whole blocks.
    for (; e < end; e += 8) {
      const int64_t count = least(8, end - e);
      const I words = levels(load_in_order<bits>(codes + e * bits / 8, code_bytes(count, bits)));
      alignas(32) T last[16];
      if constexpr (T::scalar == Scalar::f32)
        _mm256_store_si256(reinterpret_cast<I*>(last), words);
      else
        _mm256_store_si256(reinterpret_cast<I*>(last), round_pair(words, words, dither.next(), _mm256_setzero_si256()));
      std::memcpy(y + e, last, count * sizeof(T));
    }
  }

 private:
  // Codes (in the low bits of each lane, whatever is above them) to values, 16-bit types' as split_level has them.
  template <typename T, int bits>
  struct Levels {
    F min, scale, table;
    explicit Levels(Range range) : min(_mm256_set1_ps(range.min)), scale(_mm256_set1_ps(range.scale)) {
      constexpr int count = bits == 1 ? 2 : 4;
      alignas(32) float level[8];
      for (int i = 0; i < 8; ++i) {
        const float value = activation::decode(uint32_t(i % count), range);
        if constexpr (T::scalar == Scalar::f32)
          level[i] = value;
        else
          level[i] = bits_float(split_level<T>(value));
      }
      table = _mm256_load_ps(level);
    }
    I operator()(I code) const {
      if constexpr (bits <= 2) return _mm256_castps_si256(_mm256_permutevar_ps(table, code));  // reads two bits a lane
      const F whole = _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)));
      const F value = _mm256_add_ps(_mm256_mul_ps(whole, scale), min);
      if constexpr (T::scalar == Scalar::f16) return split_f16(value);
      return _mm256_castps_si256(value);
    }
  };

  // split_level<F16> of what is finite.
  static I split_f16(F value) {
    const I word = _mm256_castps_si256(_mm256_min_ps(_mm256_set1_ps(65504.f), value));
    const I magnitude = _mm256_and_si256(word, _mm256_set1_epi32(0x7fffffff)), sign = _mm256_xor_si256(word, magnitude);
    const I small = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p40f)));
    const I normal = _mm256_slli_epi32(_mm256_sub_epi32(magnitude, _mm256_set1_epi32(0x38000000)), 3);
    return _mm256_or_si256(sign, _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), magnitude)));
  }

  // Eight codes that follow each other, of which there are `bytes` bytes.
  template <int bits>
  static I load_in_order(const uint8_t* codes, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, codes, bytes);
    if constexpr (bits == 8) return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(word)));
    return _mm256_srlv_epi32(_mm256_set1_epi32(int(uint32_t(word))),
                             _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits));
  }

  // dither_bits of eight elements in a row, and then of the next.
  struct Dither {
    I bits;
    Dither(uint32_t key, int64_t e)
        : bits(_mm256_add_epi16(_mm256_set1_epi32(int(dither_bits(key, e))),
                                _mm256_setr_epi32(step(0), step(1), step(2), step(3), step(4), step(5), step(6), step(7)))) {}
    I next() {
      const I own = bits;
      bits = _mm256_add_epi16(bits, _mm256_set1_epi32(step(8)));
      return own;
    }
    static constexpr int step(int elements) { return int(uint32_t(elements) * dither_step & 0xffff); }
  };

  // Sixteen elements of a 16-bit type from two vectors of split levels.
  static I round_pair(I first, I second, I first_dither, I second_dither) {
    first = _mm256_srli_epi32(_mm256_add_epi32(first, first_dither), 16);
    second = _mm256_srli_epi32(_mm256_add_epi32(second, second_dither), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
  }

  // 32 bytes of codes to 256/bits values: word w's codes are those of lane w/2, half w%2, so a shift brings eight neighbours into place.
  template <typename T, int bits>
  __attribute__((always_inline)) static void decode_block(const uint8_t* codes, const Levels<T, bits>& levels, Dither& dither, T* y) {
    const I word = _mm256_loadu_si256(reinterpret_cast<const I*>(codes));
#pragma GCC unroll 16
    for (int j = 0; j < 16 / bits; ++j) {
      const I first = levels(_mm256_srli_epi32(word, bits * j)), second = levels(_mm256_srli_epi32(word, 16 + bits * j));
      I* target = reinterpret_cast<I*>(y + 16 * j);
      if constexpr (T::scalar == Scalar::f32) {
        _mm256_storeu_si256(target, first), _mm256_storeu_si256(target + 1, second);
      } else {
        const I first_dither = dither.next(), second_dither = dither.next();
        _mm256_storeu_si256(target, round_pair(first, second, first_dither, second_dither));
      }
    }
  }
};

}  // namespace
}  // namespace quantize::activation
