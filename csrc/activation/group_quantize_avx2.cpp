// group_quantize for AVX2.
#include "group_quantize_avx2.h"
#include "group_quantize_run.h"

namespace quantize::activation {

const GroupKernels group_kernels_avx2[3][4] = QUANTIZE_GROUP_KERNELS(SimdAvx2);

}  // namespace quantize::activation
