// group_quantize for AVX2.
#include "group_quantize_avx2.h"
#include "group_quantize_decode_avx2.h"
#include "group_quantize_run.h"

namespace quantize::activation {
namespace {

struct Kernels : EncodeAvx2, DecodeAvx2 {};

}  // namespace

const GroupKernels group_kernels_avx2[3][4] = QUANTIZE_GROUP_KERNELS(Kernels);

}  // namespace quantize::activation
