// Activations in and out of integer products, compiled for portable.
#include "image_run.h"

namespace quantize::packed {

const ImageKernels image_portable = image_of_isa;

}  // namespace quantize::packed
