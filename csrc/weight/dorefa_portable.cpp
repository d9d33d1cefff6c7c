// dorefa, compiled for portable.
#include "dorefa_run.h"

namespace quantize::weight {

const DorefaKernels dorefa_portable[3] = {dorefa_of<F32>, dorefa_of<F16>, dorefa_of<BF16>};

}  // namespace quantize::weight
