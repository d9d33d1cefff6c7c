// Codes of groups to floats, compiled for portable.
#include "decode_groups_run.h"

namespace quantize::packed {

const DecodeGroups decode_groups_portable[2] = QUANTIZE_DECODE_GROUPS;

}  // namespace quantize::packed
