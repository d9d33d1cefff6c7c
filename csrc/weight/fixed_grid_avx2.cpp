// fixed_grid, compiled for avx2.
#include "fixed_grid_run.h"

namespace quantize::weight {

const FixedGridKernels fixed_grid_avx2[3] = {fixed_grid_of<F32>, fixed_grid_of<F16>, fixed_grid_of<BF16>};

}  // namespace quantize::weight
