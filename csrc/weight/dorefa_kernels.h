// CPU kernels of dorefa: one body, compiled once per ISA, the same bits from each.
#pragma once

#include "../core/cpu_isa.h"
#include "../core/philox.h"
#include "dorefa.h"

namespace quantize::weight {

struct DorefaProducts {
  float product, count;  // sum(g t); how many |w| are the largest
};

struct DorefaPart {
  float sum, square;  // as DorefaSpread
};

// All of n elements of a piece.
struct DorefaKernels {
  float (*largest)(const void* x,
                   int64_t n);                    // of |x|; NaN if any is NaN or infinite
  float (*magnitudes)(const void* x, int64_t n);  // their sum; NaN likewise
  DorefaPart (*spread)(const void* w, int64_t n, float first);
  DorefaPart (*spread_of_levels)(const void* w, int64_t n, DorefaGrid grid, float first);
  void (*quantize)(const void* w, int64_t n, DorefaGrid grid, void* y);
  void (*sign)(const void* w, int64_t n, float step, void* y);
  DorefaProducts (*products)(const void* grad, const void* w, int64_t n, float largest);
  void (*backward)(const void* grad, const void* w, int64_t n, DorefaSlope slope, void* grad_w);
  // Elements [begin, end) of a gradient with `elements` a sample; grids: of every sample.
  void (*gradient)(Seed seed, const void* g, int64_t begin, int64_t end, int64_t elements, const GradientGrid* grids, float levels,
                   void* y);
};

// Indexed by Scalar.
extern const DorefaKernels dorefa_portable[3];
extern const DorefaKernels dorefa_avx2[3];
extern const DorefaKernels dorefa_avx512[3];

inline const DorefaKernels& dorefa_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, dorefa)[int(scalar)]; }

}  // namespace quantize::weight
