// Max pools, compiled for avx2.
#include "max_pool_run.h"

namespace quantize::layers {

const MaxPoolKernels max_pool_avx2[3] = QUANTIZE_MAX_POOL_KERNELS;

}  // namespace quantize::layers
