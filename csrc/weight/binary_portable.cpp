// binary, compiled for portable.
#include "binary_run.h"

namespace quantize::weight {

const BinaryKernels binary_portable[3] = {binary_of<F32>, binary_of<F16>, binary_of<BF16>};

}  // namespace quantize::weight
