// diffq, compiled for portable.
#include "diffq_run.h"

namespace quantize::weight {

const DiffQKernels diffq_portable[3] = {diffq_of<F32>, diffq_of<F16>, diffq_of<BF16>};

}  // namespace quantize::weight
