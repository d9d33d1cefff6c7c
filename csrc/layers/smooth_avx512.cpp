// Derivatives of smooth functions, compiled for avx512.
#include "smooth_run.h"

namespace quantize::layers {

const SmoothKernel smooth_avx512[3][5] = QUANTIZE_SMOOTH_KERNELS;
const MultiplyKernel multiply_avx512[3] = QUANTIZE_MULTIPLY_KERNELS;

}  // namespace quantize::layers
