// binary, compiled for avx2.
#include "binary_run.h"

namespace quantize::weight {

const BinaryKernels binary_avx2[3] = {binary_of<F32>, binary_of<F16>, binary_of<BF16>};

}  // namespace quantize::weight
