// Activations in and out of integer products, compiled for avx2.
#include "image_run.h"

namespace quantize::packed {

const ImageKernels image_avx2 = image_of_isa;

}  // namespace quantize::packed
