// sign_mask for AVX2: a byte of mask for eight floats, by movemask one way and by a lane-wise bit test the other.
#include <immintrin.h>

#include "sign_mask_scalar.h"

namespace quantize::activation {
namespace {

void relu(const void* source, int64_t n, float negative_slope, float max_value, void* target, uint8_t* mask) {
  const float* x = static_cast<const float*>(source);
  float* y = static_cast<float*>(target);
  const __m256 zero = _mm256_setzero_ps(), slope = _mm256_set1_ps(negative_slope), cap = _mm256_set1_ps(max_value);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const __m256 low = _mm256_cmp_ps(v, zero, _CMP_LE_OQ), high = _mm256_cmp_ps(v, cap, _CMP_GE_OQ);
    const __m256 below = negative_slope == 0.f ? zero : _mm256_mul_ps(v, slope);
    _mm256_storeu_ps(y + i, _mm256_blendv_ps(_mm256_blendv_ps(v, cap, high), below, low));
    mask[i / 8] = uint8_t(~_mm256_movemask_ps(_mm256_or_ps(low, high)));
  }
  scalar_relu<F32>(x + i, n - i, negative_slope, max_value, y + i, mask + i / 8);
}

void apply(const void* source, const uint8_t* mask, int64_t n, float on, float off, void* target) {
  const float* grad = static_cast<const float*>(source);
  float* out = static_cast<float*>(target);
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256 zero = _mm256_setzero_ps(), set = _mm256_set1_ps(on), unset = _mm256_set1_ps(off);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 is_set = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask[i / 8]), bit), bit));
    const __m256 g = _mm256_loadu_ps(grad + i);
    const __m256 if_set = on == 0.f ? zero : _mm256_mul_ps(g, set), if_unset = off == 0.f ? zero : _mm256_mul_ps(g, unset);
    _mm256_storeu_ps(out + i, _mm256_blendv_ps(if_unset, if_set, is_set));
  }
  scalar_apply<F32>(grad + i, mask + i / 8, n - i, on, off, out + i);
}

}  // namespace

const MaskKernels mask_kernels_avx2[3] = {{relu, apply}, {scalar_relu<F16>, scalar_apply<F16>}, {scalar_relu<BF16>, scalar_apply<BF16>}};

}  // namespace quantize::activation
