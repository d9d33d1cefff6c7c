// channel_quantize, compiled for portable.
#include "channel_quantize_run.h"

namespace quantize::weight {

const ChannelQuantizeKernels channel_quantize_portable[3] = {channel_quantize_of<F32>, channel_quantize_of<F16>, channel_quantize_of<BF16>};

}  // namespace quantize::weight
