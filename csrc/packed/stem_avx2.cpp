// First convolutions, compiled for avx2.
#include "stem_run.h"

namespace quantize::packed {

const StemKernels stem_avx2 = stem_of_isa;

}  // namespace quantize::packed
