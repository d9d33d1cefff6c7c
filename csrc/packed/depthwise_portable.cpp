// Depthwise convolutions, compiled for portable.
#include "depthwise_run.h"

namespace quantize::packed {

const DepthwiseKernels depthwise_portable = depthwise_of_isa;

}  // namespace quantize::packed
