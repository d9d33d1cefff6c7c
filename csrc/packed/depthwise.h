// Convolutions whose groups have one input channel each.
#pragma once

#include <ATen/core/Tensor.h>

#include "activation.h"
#include "bit_planes.h"
#include "output.h"

namespace quantize::packed {

// out = float(dot) * step * scales + bias, to the bit what the products of bytes give. x: float32, contiguous or channels last, as `rows`
// says and `out` lies, or codes [N, C, H, W], a pixel's together and filled up to fours, where `rows`. panels: float32 [N / C, taps, C
// filled up to sixteens], the weights' levels: whole numbers within +-127; output channel n is [n % (N / C), :, n / (N / C)]. `then` has no
// residual, and codes only where `rows`, of one output channel an input.
void conv2d_of_channels(const char* op, const at::Tensor& x, const ConvShape& shape, bool rows, const Activation& activation,
                        const at::Tensor& panels, const Epilogue& epilogue, float* out, const Then& then);

}  // namespace quantize::packed
