// Masks, compiled for avx2.
#include "sign_mask_run.h"

namespace quantize::activation {

const MaskKernels mask_kernels_avx2[3] = QUANTIZE_MASK_KERNELS;

}  // namespace quantize::activation
