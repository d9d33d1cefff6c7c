// lsq, compiled for portable.
#include "lsq_run.h"

namespace quantize::weight {

const LsqKernels lsq_portable[3] = {lsq_of<F32>, lsq_of<F16>, lsq_of<BF16>};

}  // namespace quantize::weight
