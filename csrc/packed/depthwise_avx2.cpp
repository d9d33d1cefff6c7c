// Depthwise convolutions, compiled for avx2.
#include "depthwise_run.h"

namespace quantize::packed {

const DepthwiseKernels depthwise_avx2 = depthwise_of_isa;

}  // namespace quantize::packed
