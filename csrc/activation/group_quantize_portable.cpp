// group_quantize for any CPU: the specification's arithmetic, element by element.
#include "group_quantize_run.h"

namespace quantize::activation {
namespace {

struct Portable {
  template <typename T>
  static Extent extent(const T* x, int64_t n) {
    return scalar_extent(x, n);
  }
  template <typename T, int bits>
  static void encode(const T* x, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, uint8_t* codes) {
    scalar_encode<T, bits>(x, begin, end, n, group, range, seed, codes);
  }
  template <typename T, int bits>
  static bool encode_groups(const T*, int, int64_t, uint32_t, const Range*, Seed, uint8_t*) {
    return false;
  }
  template <typename T, int bits>
  static void decode(const uint8_t* codes, int64_t begin, int64_t end, int64_t n, uint32_t group, Range range, Seed seed, T* y) {
    scalar_decode<T, bits>(codes, begin, end, n, group, range, seed, y);
  }
};

}  // namespace

const GroupKernels group_kernels_portable[3][4] = QUANTIZE_GROUP_KERNELS(Portable);

}  // namespace quantize::activation
