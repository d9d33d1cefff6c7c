// group_variance, compiled for avx512.
#include "group_variance_run.h"

namespace quantize::activation {

const GroupVarianceKernel group_variance_avx512[3] = {group_variance<F32>, group_variance<F16>, group_variance<BF16>};

}  // namespace quantize::activation
