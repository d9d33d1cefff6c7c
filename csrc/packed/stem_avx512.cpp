// First convolutions, compiled for avx512.
#include "stem_run.h"

namespace quantize::packed {

const StemKernels stem_avx512 = stem_of_isa;

}  // namespace quantize::packed
