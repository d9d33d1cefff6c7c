// Masks, compiled for portable.
#include "sign_mask_run.h"

namespace quantize::activation {

const MaskKernels mask_kernels_portable[3] = QUANTIZE_MASK_KERNELS;

}  // namespace quantize::activation
