// diffq, compiled for avx512.
#include "diffq_run.h"

namespace quantize::weight {

const DiffQKernels diffq_avx512[3] = {diffq_of<F32>, diffq_of<F16>, diffq_of<BF16>};

}  // namespace quantize::weight
