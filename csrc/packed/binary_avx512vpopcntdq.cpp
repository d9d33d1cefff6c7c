// Binary layers in AVX-512 with its popcount of 64-bit words; lookup while K is short, and joining taps in words would take longer.
#include "binary_image_run.h"
#include "binary_lookup_run.h"

namespace quantize::packed {
namespace {

// CarrySave's interface.
struct Popcount {
  static constexpr int64_t most = int64_t(1) << 40;
  Words total{};

  QUANTIZE_INLINE void add(Words word) { total += (Words)_mm512_popcnt_epi64((__m512i)word); }
  template <typename Word>
  QUANTIZE_INLINE void add8(Word word) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) add(word(i));
  }
  QUANTIZE_INLINE void flush() {}
  QUANTIZE_INLINE Words result(bool) { return total; }
};

}  // namespace

const BinaryKernels binary_avx512vpopcntdq{
    pack_planes,       pack_rows,       gather, multiply<Popcount>, leave_out, multiply_row<Popcount>, finish_floats, finish_bits, 12, 128,
    pack_level_planes, pack_level_rows, index,  gather_index,       lookup};

}  // namespace quantize::packed
