// Binary layers for any processor.
#include "binary_image_run.h"

namespace quantize::packed {

const BinaryKernels binary_portable{pack_planes,
                                    pack_rows,
                                    gather,
                                    multiply<CarrySave>,
                                    leave_out,
                                    multiply_row<CarrySave>,
                                    finish_floats,
                                    finish_bits,
                                    0,
                                    0,
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    nullptr};

}  // namespace quantize::packed
