// Sums of squares, compiled for avx512.
#include "energy_run.h"

namespace quantize::layers {

const EnergyKernel energy_avx512[3] = QUANTIZE_ENERGY_KERNELS;

}  // namespace quantize::layers
