// dorefa, compiled for avx512.
#include "dorefa_run.h"

namespace quantize::weight {

const DorefaKernels dorefa_avx512[3] = {dorefa_of<F32>, dorefa_of<F16>, dorefa_of<BF16>};

}  // namespace quantize::weight
