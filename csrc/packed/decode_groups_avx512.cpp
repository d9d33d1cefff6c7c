// Codes of groups to floats, compiled for avx512.
#include "decode_groups_run.h"

namespace quantize::packed {

const DecodeGroups decode_groups_avx512[2] = QUANTIZE_DECODE_GROUPS;

}  // namespace quantize::packed
