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
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return channel_quantize_avx512[int(scalar)];
  if (isa == Isa::avx2) return channel_quantize_avx2[int(scalar)];
#endif
  return channel_quantize_portable[int(scalar)];
}

}  // namespace quantize::weight
