// Sums of squares, compiled for portable.
#include "energy_run.h"

namespace quantize::layers {

const EnergyKernel energy_portable[3] = QUANTIZE_ENERGY_KERNELS;

}  // namespace quantize::layers
