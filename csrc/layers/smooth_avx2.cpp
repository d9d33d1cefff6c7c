// Derivatives of smooth functions, compiled for avx2.
#include "smooth_run.h"

namespace quantize::layers {

const SmoothKernel smooth_avx2[3][5] = QUANTIZE_SMOOTH_KERNELS;
const MultiplyKernel multiply_avx2[3] = QUANTIZE_MULTIPLY_KERNELS;

}  // namespace quantize::layers
