// sign_mask for any CPU.
#include "sign_mask_scalar.h"

namespace quantize::activation {

const MaskKernels mask_kernels_portable[3] = {
    {scalar_relu<F32>, scalar_apply<F32>}, {scalar_relu<F16>, scalar_apply<F16>}, {scalar_relu<BF16>, scalar_apply<BF16>}};

}  // namespace quantize::activation
