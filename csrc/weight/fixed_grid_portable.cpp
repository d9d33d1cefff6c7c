// fixed_grid, compiled for portable.
#include "fixed_grid_run.h"

namespace quantize::weight {

const FixedGridKernels fixed_grid_portable[3] = {fixed_grid_of<F32>, fixed_grid_of<F16>, fixed_grid_of<BF16>};

}  // namespace quantize::weight
