// Max pools, compiled for portable.
#include "max_pool_run.h"

namespace quantize::layers {

const MaxPoolKernels max_pool_portable[3] = QUANTIZE_MAX_POOL_KERNELS;

}  // namespace quantize::layers
