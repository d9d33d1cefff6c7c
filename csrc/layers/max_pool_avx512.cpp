// Max pools, compiled for avx512.
#include "max_pool_run.h"

namespace quantize::layers {

const MaxPoolKernels max_pool_avx512[3] = QUANTIZE_MAX_POOL_KERNELS;

}  // namespace quantize::layers
