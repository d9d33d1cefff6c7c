// The batch norm's backward, compiled for portable.
#include "batch_norm_run.h"

namespace quantize::layers {

const BatchNormKernels batch_norm_portable[3] = QUANTIZE_BATCH_NORM_KERNELS;

}  // namespace quantize::layers
