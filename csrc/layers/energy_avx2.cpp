// Sums of squares, compiled for avx2.
#include "energy_run.h"

namespace quantize::layers {

const EnergyKernel energy_avx2[3] = QUANTIZE_ENERGY_KERNELS;

}  // namespace quantize::layers
