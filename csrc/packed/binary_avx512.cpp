// Binary layers in AVX-512 without its popcount: lookup while K is short, carry-save adders (an instruction for the sum, one for the
// carry) where it is long.
#include "binary_image_run.h"
#include "binary_lookup_run.h"

namespace quantize::packed {

const BinaryKernels binary_avx512{pack_planes,
                                  pack_rows,
                                  gather,
                                  multiply<CarrySave>,
                                  leave_out,
                                  multiply_row<CarrySave>,
                                  finish_floats,
                                  finish_bits,
                                  32,
                                  128,
                                  pack_level_planes,
                                  pack_level_rows,
                                  index,
                                  gather_index,
                                  lookup};

}  // namespace quantize::packed
