// From an ISA's primitives to its kernel table. `Isa` provides
//   static Extent extent(const T* x, int64_t n);
//   static void encode<T, bits>(const T* x, begin, end, n, group, range, seed, codes);   // a group's elements [begin, end)
//   static bool encode_groups<T, bits>(const T* x, groups, group_size, group, ranges, seed, codes);   // false: does not apply
//   static void decode<T, bits>(const uint8_t* codes, begin, end, n, group, range, seed, y);
#pragma once

#include "group_quantize_scalar.h"

namespace quantize::activation {
namespace {

template <class Isa, typename T, int bits>
struct GroupRunner {
  // The ranges of a few groups are found before any of them is encoded: the divisions overlap, and the groups stay in the L1 cache.
  static constexpr int batch = 4;

  static void quantize(const void* source, GroupRun run, Seed seed, uint8_t* codes, uint16_t* ranges) {
    const T* x = static_cast<const T*>(source);
    const int64_t bytes = code_bytes(run.group_size, bits);
    uint32_t group = run.first_group;
    Range range[batch];
    for (int64_t done = 0; done < run.elements;) {
      const int groups = int(least(batch, (run.elements - done + run.group_size - 1) / run.group_size));
      for (int i = 0; i < groups; ++i) {
        const int64_t begin = done + i * run.group_size;
        const StoredRange stored = store_range<T>(Isa::extent(x + begin, least(run.group_size, run.elements - begin)), bits);
        range[i] = load_range<T>(stored, bits);
        ranges[2 * i] = stored.first, ranges[2 * i + 1] = stored.second;
      }
      bool ordinary = done + groups * run.group_size <= run.elements;
      for (int i = 0; i < groups; ++i) ordinary = ordinary && !range[i].extreme && !is_poisoned(range[i]);
      if (!ordinary || !Isa::template encode_groups<T, bits>(x + done, groups, run.group_size, group, range, seed, codes))
        for (int i = 0; i < groups; ++i) {
          const int64_t begin = done + i * run.group_size, n = least(run.group_size, run.elements - begin);
          encode(x + begin, 0, n, n, group + i, range[i], seed, codes + i * bytes);
        }
      group += groups, codes += groups * bytes;
      ranges += 2 * groups;
      done += groups * run.group_size;
    }
  }

  static void dequantize(const uint8_t* codes, const uint16_t* ranges, GroupRun run, Seed seed, void* target) {
    T* y = static_cast<T*>(target);
    const int64_t bytes = code_bytes(run.group_size, bits);
    uint32_t group = run.first_group;
    for (int64_t done = 0; done < run.elements; done += run.group_size, codes += bytes, ranges += 2, ++group) {
      const int64_t n = least(run.group_size, run.elements - done);
      Isa::template decode<T, bits>(codes, 0, n, n, group, load_range<T>({ranges[0], ranges[1]}, bits), seed, y + done);
    }
  }

  static Extent extent(const void* x, int64_t n) { return Isa::extent(static_cast<const T*>(x), n); }

  static void quantize_piece(const void* x, GroupPiece p, Range range, Seed seed, uint8_t* codes) {
    encode(static_cast<const T*>(x), p.begin, p.begin + p.elements, p.group_elements, p.group, range, seed, codes);
  }

  static void dequantize_piece(const uint8_t* codes, GroupPiece p, Range range, Seed seed, void* y) {
    Isa::template decode<T, bits>(codes, p.begin, p.begin + p.elements, p.group_elements, p.group, range, seed, static_cast<T*>(y));
  }

  static constexpr GroupKernels table() { return {quantize, dequantize, extent, quantize_piece, dequantize_piece}; }

 private:
  static void encode(const T* x, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, uint8_t* codes) {
    if (is_poisoned(range)) {  // decodes to NaN whatever the codes; zero keeps every backend's bytes the same
      clear_codes<bits>(begin, end, n, codes);
    } else {
      Isa::template encode<T, bits>(x, begin, end, n, group, range, seed, codes);
    }
  }
};

#define QUANTIZE_GROUP_KERNELS_OF(ISA, T) \
  { GroupRunner<ISA, T, 1>::table(), GroupRunner<ISA, T, 2>::table(), GroupRunner<ISA, T, 4>::table(), GroupRunner<ISA, T, 8>::table() }
#define QUANTIZE_GROUP_KERNELS(ISA) \
  { QUANTIZE_GROUP_KERNELS_OF(ISA, F32), QUANTIZE_GROUP_KERNELS_OF(ISA, F16), QUANTIZE_GROUP_KERNELS_OF(ISA, BF16) }

}  // namespace
}  // namespace quantize::activation
