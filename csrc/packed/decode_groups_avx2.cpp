// Codes of groups to floats, compiled for avx2.
#include "decode_groups_run.h"

namespace quantize::packed {

const DecodeGroups decode_groups_avx2[2] = QUANTIZE_DECODE_GROUPS;

}  // namespace quantize::packed
