// Binary layers in AVX2: lookup always, where nibbles do not straddle taps.
#include "binary_image_run.h"
#include "binary_lookup_run.h"

namespace quantize::packed {

const BinaryKernels binary_avx2{pack_planes,
                                pack_rows,
                                gather,
                                multiply<CarrySave>,
                                leave_out,
                                multiply_row<CarrySave>,
                                finish_floats,
                                finish_bits,
                                int64_t(1) << 40,
                                64,
                                pack_level_planes,
                                pack_level_rows,
                                index,
                                gather_index,
                                lookup};

}  // namespace quantize::packed
