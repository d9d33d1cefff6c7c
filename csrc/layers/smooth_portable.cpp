// Derivatives of smooth functions, compiled for portable.
#include "smooth_run.h"

namespace quantize::layers {

const SmoothKernel smooth_portable[3][5] = QUANTIZE_SMOOTH_KERNELS;
const MultiplyKernel multiply_portable[3] = QUANTIZE_MULTIPLY_KERNELS;

}  // namespace quantize::layers
