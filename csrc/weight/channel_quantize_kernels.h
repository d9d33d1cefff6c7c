// CPU kernels of channel_quantize: one body, compiled once per ISA, the same bits from each.
#pragma once

#include "../core/cpu_isa.h"
#include "channel_quantize.h"

namespace quantize::weight {

struct ChannelQuantizeKernels {
  // w, y: n elements of one channel.
  ChannelScale (*quantize)(const void* w, int64_t n, const Codebook& book, void* y);
  // grad_w = grad where |w| <= limit, else 0
  void (*clip)(const void* grad, const void* w, int64_t n, float limit, void* grad_w);
};

// Indexed by Scalar.
extern const ChannelQuantizeKernels channel_quantize_portable[3];
extern const ChannelQuantizeKernels channel_quantize_avx2[3];
extern const ChannelQuantizeKernels channel_quantize_avx512[3];

inline const ChannelQuantizeKernels& channel_quantize_kernels(Isa isa, Scalar scalar) {
  return QUANTIZE_BY_ISA(isa, channel_quantize)[int(scalar)];
}

}  // namespace quantize::weight
