// The batch norm's backward, compiled for avx2.
#include "batch_norm_run.h"

namespace quantize::layers {

const BatchNormKernels batch_norm_avx2[3] = QUANTIZE_BATCH_NORM_KERNELS;

}  // namespace quantize::layers
