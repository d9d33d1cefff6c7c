// CPU kernels of sample_energy: the sum of the squares of n neighbours. Torch-free.
#pragma once

#include "../core/cpu_isa.h"
#include "../core/half.h"

namespace quantize::layers {

using EnergyKernel = double (*)(const void* x, int64_t n);

// Indexed by Scalar.
extern const EnergyKernel energy_portable[3];
extern const EnergyKernel energy_avx2[3];
extern const EnergyKernel energy_avx512[3];

inline EnergyKernel energy_kernel(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, energy)[int(scalar)]; }

}  // namespace quantize::layers
