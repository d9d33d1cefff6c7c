// channel_quantize, compiled for avx512.
#include "channel_quantize_run.h"

namespace quantize::weight {

const ChannelQuantizeKernels channel_quantize_avx512[3] = {channel_quantize_of<F32>, channel_quantize_of<F16>, channel_quantize_of<BF16>};

}  // namespace quantize::weight
