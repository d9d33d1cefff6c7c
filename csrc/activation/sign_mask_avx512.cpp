// Masks, compiled for avx512.
#include "sign_mask_run.h"

namespace quantize::activation {

const MaskKernels mask_kernels_avx512[3] = QUANTIZE_MASK_KERNELS;

}  // namespace quantize::activation
