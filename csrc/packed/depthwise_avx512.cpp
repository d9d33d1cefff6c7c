// Depthwise convolutions, compiled for avx512.
#include "depthwise_run.h"

namespace quantize::packed {

const DepthwiseKernels depthwise_avx512 = depthwise_of_isa;

}  // namespace quantize::packed
