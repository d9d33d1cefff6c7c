// sign_mask for AVX-512: the mask registers are the packed mask.
#include <immintrin.h>

#include "sign_mask_scalar.h"

namespace quantize::activation {
namespace {

void relu(const void* source, int64_t n, float negative_slope, float max_value, void* target, uint8_t* mask) {
  const float* x = static_cast<const float*>(source);
  float* y = static_cast<float*>(target);
  const __m512 zero = _mm512_setzero_ps(), slope = _mm512_set1_ps(negative_slope), cap = _mm512_set1_ps(max_value);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 low = _mm512_cmp_ps_mask(v, zero, _CMP_LE_OQ), high = _mm512_cmp_ps_mask(v, cap, _CMP_GE_OQ);
    const __m512 below = negative_slope == 0.f ? zero : _mm512_mul_ps(v, slope);
    _mm512_storeu_ps(y + i, _mm512_mask_blend_ps(low, _mm512_mask_blend_ps(high, v, cap), below));
    const uint16_t bits = uint16_t(~(low | high));
    mask[i / 8] = uint8_t(bits), mask[i / 8 + 1] = uint8_t(bits >> 8);
  }
  scalar_relu<F32>(x + i, n - i, negative_slope, max_value, y + i, mask + i / 8);
}

void apply(const void* source, const uint8_t* mask, int64_t n, float on, float off, void* target) {
  const float* grad = static_cast<const float*>(source);
  float* out = static_cast<float*>(target);
  const __m512 zero = _mm512_setzero_ps(), set = _mm512_set1_ps(on), unset = _mm512_set1_ps(off);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 is_set = __mmask16(mask[i / 8] | mask[i / 8 + 1] << 8);
    const __m512 g = _mm512_loadu_ps(grad + i);
    const __m512 if_set = on == 0.f ? zero : _mm512_mul_ps(g, set), if_unset = off == 0.f ? zero : _mm512_mul_ps(g, unset);
    _mm512_storeu_ps(out + i, _mm512_mask_blend_ps(is_set, if_unset, if_set));
  }
  scalar_apply<F32>(grad + i, mask + i / 8, n - i, on, off, out + i);
}

}  // namespace

const MaskKernels mask_kernels_avx512[3] = {{relu, apply}, {scalar_relu<F16>, scalar_apply<F16>}, {scalar_relu<BF16>, scalar_apply<BF16>}};

}  // namespace quantize::activation
